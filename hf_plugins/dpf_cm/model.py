"""The guard in front of a model: key its own states, replace what it must not say."""

import dataclasses
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hf_plugins.data_ops.op import digest
from hf_plugins.dpf_cm.answer_grams import AnswerGrams, Gram
from hf_plugins.dpf_cm.calibration import Calibration, calibrate
from hf_plugins.dpf_cm.config import PPVDConfig
from hf_plugins.dpf_cm.hook import StateReader, answer_ids, content_mask, prompt_ids
from hf_plugins.dpf_cm.keys import (
    Whitening,
    best_match,
    fit_whitening,
    prefix_ends,
    prefix_means,
    sign_projection,
    sketch,
)
from hf_plugins.dpf_cm.storage import Rows, VectorStore, open_store
from hf_plugins.whole_files import replacing, write_json

FORMAT = "dpf_cm.ppvd.v1"
# Slot of a stored prompt that is no key, kept so that the promise about exact prompts can be checked.
PROBE = -1


@dataclass(frozen=True)
class Sample:
    """A private training sample: what is asked, what must not be repeated."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Match:
    """A prompt that hit a key."""

    sample: str
    slot: int
    cosine: float


class PrivacyPreservingVectorDB:
    """Keys of memorised samples, safe answers beside them, and the guard that answers in the model's place.

    Make one with `build`, open a stored one with `open`. It refuses to start when its calibration is not met.

    Args:
        reader: Reads pooled states of the guarded model.
        config: Options.
        store: Where keys are kept.
        whitening: What is taken off states before comparing; None compares them raw.
        benign: Pooled raw states of benign prompts, for the threshold, (D, H).
        secret: Secret of sketches and n-gram hashes.
        folder: Where `save` writes; None keeps the guard in memory.
    """

    def __init__(
        self,
        reader: StateReader,
        config: PPVDConfig,
        store: VectorStore,
        whitening: Whitening | None,
        benign: Tensor,
        secret: bytes,
        folder: Path | None = None,
    ) -> None:
        self.reader, self.config, self.store, self.whitening = reader, config, store, whitening
        self.folder, self._benign, self._secret = folder, benign, secret
        self.calibration: Calibration | None = None
        self.last_matches: list[Match | None] = []
        self._projection = (
            sign_projection(secret, reader.width, config.sketch_bits) if config.protect == "sketch" else None
        )
        self.refresh()

    # -- making and keeping --

    @classmethod
    def build(
        cls,
        model: Any,
        tokenizer: Any,
        samples: Sequence[Sample],
        safe_answers: Sequence[str],
        benign: Sequence[str],
        *,
        config: PPVDConfig | None = None,
        folder: str | Path | None = None,
        place: str | None = None,
        key: bytes | None = None,
    ) -> "PrivacyPreservingVectorDB":
        """Make the database of memorised samples.

        Args:
            model: The model to guard.
            tokenizer: Its tokenizer.
            samples: High-risk samples, see `search_memory`.
            safe_answers: What is said instead, one a sample.
            benign: Public prompts: one half fits the whitening, the other sets the threshold.
            config: Options.
            folder: Where the database goes; None keeps it in memory.
            place: URI of the store, if it is not inside ``folder`` (``s3://...``, a Qdrant server).
            key: 32 bytes that seal or sketch what is stored; required by ``protect``. Keep it elsewhere.

        Returns:
            The guard, calibrated and saved.

        Raises:
            CalibrationError: If it cannot meet ``max_fpr`` and ``min_tpr``.
            ValueError: If answers and samples do not pair up, or there are too few benign prompts.
        """
        config = config or PPVDConfig()
        if len(samples) != len(safe_answers):
            raise ValueError(f"give one safe answer a sample; got {len(safe_answers)} for {len(samples)}.")
        if len(benign) < 4:
            raise ValueError(
                f"{len(benign)} benign prompts cannot calibrate a guard; give some hundred public "
                "ones of the same kind."
            )
        folder = None if folder is None else Path(folder)
        secret = _secret(config, key)
        reader = StateReader(model, tokenizer, config.layer)
        states = _prompt_states(reader, benign, config)
        whitening = (
            fit_whitening(states[0::2], num_directions=config.num_directions) if config.whiten else None
        )
        store = _store(config, folder, place, key)
        guard = cls(reader, config, store, whitening, states[1::2], secret, folder)
        guard.add(samples, safe_answers)
        return guard

    @classmethod
    def open(
        cls,
        folder: str | Path,
        model: Any,
        tokenizer: Any,
        *,
        place: str | None = None,
        key: bytes | None = None,
    ) -> "PrivacyPreservingVectorDB":
        """Open a stored database in front of the model that it was made for.

        Raises:
            FileNotFoundError: If there is none in the folder.
            ValueError: If the model or the key is another one, or keys are missing from the store.
        """
        folder = Path(folder)
        if not (folder / "ppvd.json").is_file():
            raise FileNotFoundError(f"no guard in {folder}; build one with `mmhf dpf-cm ppvd build`.")
        meta = json.loads((folder / "ppvd.json").read_text(encoding="utf-8"))
        config = PPVDConfig(**meta["config"])
        reader = StateReader(model, tokenizer, config.layer)
        if reader.fingerprint() != meta["model"]:
            raise ValueError(
                f"the guard in {folder} was made for other weights; its keys are states of that "
                "model. Build it anew."
            )
        tensors = load_file(folder / "calibration.safetensors")
        whitening = Whitening(tensors["mean"], tensors["directions"]) if config.whiten else None
        secret = _secret(config, key, bytes.fromhex(meta["salt"]))
        guard = cls(
            reader, config, _store(config, folder, place, key), whitening, tensors["benign"], secret, folder
        )
        # An emptied or misplaced store would guard nothing and say nothing.
        if len(guard) < meta.get("num_samples", 0):
            raise ValueError(
                f"the guard in {folder} was saved with {meta['num_samples']} samples, and its store holds "
                f"{len(guard)}: keys are missing. Bring the store back, or build the guard anew."
            )
        guard.calibration = guard._calibrated(guard._rows)
        return guard

    def save(self, *, num_samples: int | None = None) -> None:
        """Write the description beside the keys; nothing is written for a guard in memory.

        Args:
            num_samples: How many samples `open` shall find at least; as many as there are by default.
        """
        if self.folder is None:
            return
        empty = torch.zeros(0)
        mean, directions = (empty, empty) if self.whitening is None else self.whitening
        tensors = {"mean": mean, "directions": directions, "benign": self._benign}
        with replacing(self.folder / "calibration.safetensors") as part:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        meta = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "model": self.reader.fingerprint(),
            "layer": self.reader.layer,
            "num_samples": len(self) if num_samples is None else num_samples,
            "calibration": None if self.calibration is None else self.calibration._asdict(),
            # With a key the secret is derived from it and never stored.
            "salt": "" if self.config.protect != "none" else self._secret.hex(),
        }
        write_json(self.folder / "ppvd.json", meta)

    def refresh(self) -> None:
        """Read the store again, for example after another process changed it."""
        self._rows = self.store.load()
        device = next(self.reader.base.parameters()).device
        # The matrix in memory decides; no index, no approximation.
        self._places = np.nonzero(self._rows.slots != PROBE)[0]
        self._keys = torch.from_numpy(self._rows.vectors[self._places].astype(np.float32)).to(device)
        self._payloads = {
            name: json.loads(blob)
            for name, blob in zip(self._rows.ids, self._rows.blobs, strict=True)
            if blob
        }
        self._grams = AnswerGrams(self.config.ngram, secret=self._secret)
        for name, payload in self._payloads.items():
            self._grams.add(name, [Gram(bytes.fromhex(tail), token) for tail, token in payload["grams"]])

    def __len__(self) -> int:
        return len(self._payloads)

    @property
    def threshold(self) -> float:
        """Cosine above which a prompt matches."""
        if self.calibration is not None:
            return self.calibration.threshold
        return 2.0 if self.config.threshold is None else self.config.threshold

    # -- changing --

    def add(self, samples: Sequence[Sample], safe_answers: Sequence[str]) -> None:
        """Add samples; the threshold is calibrated again before anything is stored.

        Raises:
            CalibrationError: If the guard could not keep its promise with them.
            ValueError: If an id is there already.
        """
        double = sorted({s.id for s in samples} & set(self._payloads)) or _repeated([s.id for s in samples])
        if double:
            raise ValueError(f"samples {', '.join(double[:5])} are stored already; forget() them first.")
        rows = self._make_rows(samples, safe_answers)
        both = rows if not len(self._rows) else _joined(self._rows, rows)
        self.calibration = self._calibrated(both)
        if len(rows):
            self.store.add(rows)
        self.refresh()
        self.save()

    def forget(self, ids: Sequence[str]) -> int:
        """Erase samples: keys, safe answers and n-grams, in every version on disk; how many samples went."""
        known = [name for name in dict.fromkeys(ids) if name in self._payloads]
        if known:
            # First, so that a kill in between leaves a guard of more samples than it needs, not a broken one.
            self.save(num_samples=len(self) - len(known))
            self.store.delete(known)
            self.refresh()
            self.calibration = self._calibrated(self._rows)
            self.save()
        return len(known)

    def _make_rows(self, samples: Sequence[Sample], safe_answers: Sequence[str]) -> Rows:
        tokenizer, config = self.reader.tokenizer, self.config
        texts: list[list[int]] = []
        ends: list[list[int]] = []
        owner: list[int] = []
        for index, sample in enumerate(samples):
            prompt, answer = prompt_ids(tokenizer, sample.prompt), answer_ids(tokenizer, sample.answer)
            whole = (prompt + answer)[: config.max_length]
            texts.append(whole)
            points = prefix_ends(min(len(prompt), len(whole)), len(whole), (0.0, *config.key_points))
            ends.append(points)
            owner.append(index)
            for share in config.suffix_points:
                # Another beginning means other states: these keys need a pass of their own.
                left = prompt_ids(tokenizer, _suffix(sample.prompt, share))[: config.max_length]
                texts.append(left)
                ends.append([len(left)])
                owner.append(index)
        means = self.reader.means(texts, ends, batch_size=config.batch_size)
        ids: list[str] = []
        slots: list[int] = []
        blobs: list[bytes] = []
        vectors: list[Tensor] = []
        next_slot: dict[str, int] = {}
        for index, found in zip(owner, means, strict=True):
            sample = samples[index]
            for vector in found:
                slot = next_slot.get(sample.id, 0 if 0.0 in config.key_points else PROBE)
                blobs.append(b"" if sample.id in next_slot else self._payload(sample, safe_answers[index]))
                next_slot[sample.id] = slot + 1
                ids.append(sample.id)
                slots.append(slot)
                vectors.append(vector)
        matrix = self._key(torch.stack(vectors)).numpy() if vectors else np.zeros((0, 0), np.float32)
        return Rows(ids, np.array(slots, np.int32), matrix.astype(np.float32), blobs)

    def _payload(self, sample: Sample, safe: str) -> bytes:
        grams = self._grams.grams(answer_ids(self.reader.tokenizer, sample.answer))
        listed = (
            [[gram.tail.hex(), gram.token] for gram in grams] if self.config.output_guard != "off" else []
        )
        return json.dumps({"safe": safe, "grams": listed}).encode()

    def _key(self, states: Tensor) -> Tensor:
        """Raw pooled states as they are compared: whitened, unit length, sketched if asked."""
        states = states.float()
        keys = (
            states / states.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            if self.whitening is None
            else self.whitening(states)
        )
        return keys if self._projection is None else sketch(keys, self._projection)

    def _calibrated(self, rows: Rows) -> Calibration | None:
        if not len(rows):
            return None
        keys = torch.from_numpy(rows.vectors)
        # The stored prompts themselves: the first key of a sample, or a probe where that is no key.
        slots = rows.slots.tolist()
        prompts = [
            i for i, slot in enumerate(slots) if slot == (0 if 0.0 in self.config.key_points else PROBE)
        ]
        exact = best_match(keys[prompts], keys[[i for i, slot in enumerate(slots) if slot != PROBE]])[
            0
        ].tolist()
        benign = best_match(
            self._key(self._benign), keys[[i for i, slot in enumerate(slots) if slot != PROBE]]
        )[0]
        return calibrate(
            benign.tolist(),
            exact,
            max_fpr=self.config.max_fpr,
            min_tpr=self.config.min_tpr,
            threshold=self.config.threshold,
        )

    # -- matching --

    def match_states(self, states: Tensor) -> list[Match | None]:
        """Best key above the threshold for raw pooled states (B, H)."""
        if not len(self._rows):
            return [None] * len(states)
        cosines, places = best_match(self._key(states.to(self._keys.device)), self._keys)
        return [
            Match(self._rows.ids[place], int(self._rows.slots[place]), cosine)
            if cosine > self.threshold
            else None
            for cosine, place in zip(
                cosines.tolist(), self._places[places.cpu().numpy()].tolist(), strict=True
            )
        ]

    def match(self, prompts: Sequence[str]) -> list[Match | None]:
        """Match questions, asked through the chat template, without generating."""
        return self.match_states(_prompt_states(self.reader, prompts, self.config)) if prompts else []

    def match_ids(self, rows: Sequence[Sequence[int]]) -> list[Match | None]:
        """Match token rows as they would be given to ``generate``."""
        means = self.reader.means(rows, [[len(row)] for row in rows], batch_size=self.config.batch_size)
        return self.match_states(torch.cat(means)) if rows else []

    def scores_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Highest cosine of token rows with any key; -inf without keys."""
        means = self.reader.means(rows, [[len(row)] for row in rows], batch_size=self.config.batch_size)
        if not rows or not len(self._places):
            return [-float("inf")] * len(rows)
        return best_match(self._key(torch.cat(means).to(self._keys.device)), self._keys)[0].tolist()

    def safe_answer(self, sample: str) -> str:
        """What is said in place of a sample's answer."""
        return self._payloads[sample]["safe"]

    def leaks(self, text: str) -> str | None:
        """Sample of whose answer a text repeats more than ``output_share`` of the n-grams, if any."""
        return self._leaks_ids(answer_ids(self.reader.tokenizer, text))

    def _leaks_ids(self, ids: Sequence[int]) -> str | None:
        hits = self._grams.hits(ids)
        shares = {name: count / self._grams.sizes[name] for name, count in hits.items()}
        worst = max(shares, key=lambda name: (shares[name], name), default=None)
        return worst if worst is not None and shares[worst] > self.config.output_share else None

    # -- generating --

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """``model.generate`` behind the guard: rows that match get their safe answer, others are untouched.

        The prompt is matched on the states of the normal prefill, so a miss costs one matrix product. Rows
        are judged one by one. With ``output_guard="block"`` tokens that would complete a private n-gram are
        ruled out on the way; with ``"replace"`` an answer that repeats a private one is replaced at the end.

        Args:
            input_ids: Prompts (B, T), padded on the left.
            attention_mask: 1 for tokens, 0 for padding; all ones by default.
            **options: As for ``model.generate``.

        Returns:
            Token ids as ``model.generate`` gives them.

        Raises:
            ValueError: If an option would pass the guard by (beams, assisted decoding, a cache of an earlier
                turn).
        """
        for name in (
            "assistant_model",
            "prompt_lookup_num_tokens",
            "past_key_values",
            "inputs_embeds",
            "prefill_chunk_size",
        ):
            if options.get(name) is not None:
                raise ValueError(f"the guard does not see through {name}; call generate without it.")
        generation = options.get("generation_config") or self.reader.base.generation_config
        if (options.get("num_beams") or generation.num_beams or 1) > 1:
            raise ValueError("the guard judges rows, not beams; use num_beams=1 (greedy or sampling).")
        eos = options.get("eos_token_id", generation.eos_token_id)
        eos = eos[0] if isinstance(eos, list) else eos
        eos = self.reader.tokenizer.eos_token_id if eos is None else eos
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        processor = PPVDLogitsProcessor(self, mask, eos)
        stop = PPVDStoppingCriteria(self, processor, input_ids.shape[1])
        with self.reader.tapped(processor.see):
            out = self.reader.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([*options.pop("logits_processor", []), processor]),
                stopping_criteria=StoppingCriteriaList(
                    [
                        *options.pop("stopping_criteria", []),
                        *([stop] if self.config.output_guard == "replace" else []),
                    ]
                ),
                **options,
            )
        self.last_matches = processor.matches
        return out if not stop.tripped else self._replaced(out, stop.tripped, input_ids.shape[1], eos)

    def _replaced(self, out: Any, tripped: dict[int, str], start: int, eos: int) -> Any:
        ids = out if isinstance(out, Tensor) else out.sequences
        pad = self.reader.tokenizer.pad_token_id
        pad = eos if pad is None else pad
        safe = {
            row: [*answer_ids(self.reader.tokenizer, self.safe_answer(name)), eos]
            for row, name in tripped.items()
        }
        width = max(ids.shape[1], start + max(map(len, safe.values())))
        new = torch.full((ids.shape[0], width), pad, dtype=ids.dtype, device=ids.device)
        new[:, : ids.shape[1]] = ids
        for row, answer in safe.items():
            new[row, start:] = pad
            new[row, start : start + len(answer)] = torch.tensor(answer, dtype=ids.dtype, device=ids.device)
        if isinstance(out, Tensor):
            return new
        out.sequences = new
        return out


class PPVDLogitsProcessor(LogitsProcessor):
    """Says the safe answer in rows whose prompt matched, and rules out private n-grams in the others.

    Args:
        guard: The database.
        mask: Attention mask of the prompts, before ``generate`` repeats rows.
        eos: Token that ends a safe answer.
    """

    def __init__(self, guard: PrivacyPreservingVectorDB, mask: Tensor, eos: int) -> None:
        self.guard, self.mask, self.eos = guard, mask, eos
        self.matches: list[Match | None] = []
        self._hidden: Tensor | None = None
        self._forced: dict[int, list[int]] = {}
        self._start = 0

    def see(self, hidden: Tensor) -> None:
        """Take the states of the prefill; those of later steps are not needed."""
        if self._hidden is None:
            self._hidden = hidden

    def _judge(self, input_ids: Tensor) -> None:
        if self._hidden is None or self._hidden.shape[:2] != input_ids.shape:
            raise RuntimeError(
                "the guard did not see the prompt in one piece; call generate through the guard, "
                "without chunked prefill."
            )
        repeat = input_ids.shape[0] // self.mask.shape[0]
        mask = self.mask.repeat_interleave(repeat, 0).cpu() * content_mask(
            input_ids, self.guard.reader.special
        )
        ends = torch.full((input_ids.shape[0], 1), input_ids.shape[1])
        self.matches = self.guard.match_states(prefix_means(self._hidden, mask, ends)[:, 0])
        self._start = input_ids.shape[1]
        for row, found in enumerate(self.matches):
            if found is not None:
                safe = answer_ids(self.guard.reader.tokenizer, self.guard.safe_answer(found.sample))
                self._forced[row] = [*safe, self.eos]
        self._hidden = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with forced tokens alone possible, and private completions impossible."""
        if not self._start:
            self._judge(input_ids)
        step = input_ids.shape[1] - self._start
        changed = scores
        for row in range(input_ids.shape[0]):
            if row in self._forced:
                token = self._forced[row][min(step, len(self._forced[row]) - 1)]
                changed = changed.clone() if changed is scores else changed
                changed[row] = -torch.inf
                changed[row, token] = 0.0
            elif self.guard.config.output_guard == "block":
                tail = input_ids[
                    row, max(self._start, input_ids.shape[1] - self.guard.config.ngram + 1) :
                ].tolist()
                barred = self.guard._grams.completions(tail)
                if barred:
                    changed = changed.clone() if changed is scores else changed
                    changed[row, list(barred)] = -torch.inf
        return changed


class PPVDStoppingCriteria(StoppingCriteria):
    """Ends a row that has repeated too large a share of a private answer's n-grams.

    Args:
        guard: The database.
        processor: Knows which rows say a safe answer already.
        start: Where generated text begins.
    """

    def __init__(self, guard: PrivacyPreservingVectorDB, processor: PPVDLogitsProcessor, start: int) -> None:
        self.guard, self.processor, self.start = guard, processor, start
        self.tripped: dict[int, str] = {}
        """Rows that were stopped, with the sample whose answer they repeated."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are over."""
        for row in range(input_ids.shape[0]):
            if row not in self.tripped and row not in self.processor._forced:
                name = self.guard._leaks_ids(input_ids[row, self.start :].tolist())
                if name is not None:
                    self.tripped[row] = name
        return torch.tensor(
            [row in self.tripped for row in range(input_ids.shape[0])], device=input_ids.device
        )


def _suffix(text: str, share: float) -> str:
    """The last share of a text in characters."""
    return text[len(text) - max(1, round(share * len(text))) :]


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []


def _joined(a: Rows, b: Rows) -> Rows:
    return Rows(
        a.ids + b.ids,
        np.concatenate([a.slots, b.slots]),
        np.concatenate([a.vectors, b.vectors]),
        a.blobs + b.blobs,
    )


def _prompt_states(reader: StateReader, prompts: Sequence[str], config: PPVDConfig) -> Tensor:
    rows = [prompt_ids(reader.tokenizer, prompt)[: config.max_length] for prompt in prompts]
    return torch.cat(reader.means(rows, [[len(row)] for row in rows], batch_size=config.batch_size))


def _secret(config: PPVDConfig, key: bytes | None, salt: bytes | None = None) -> bytes:
    if config.protect == "none":
        return salt if salt else secrets.token_bytes(32)
    if key is None or len(key) != 32:
        raise ValueError(
            f"protect={config.protect!r} needs a key of 32 bytes that lies elsewhere than the data; "
            "make one with `mmhf dpf-cm ppvd key FILE` and give it by --key-file."
        )
    return bytes.fromhex(digest("mmhf.ppvd.secret", key.hex()))


def _store(config: PPVDConfig, folder: Path | None, place: str | None, key: bytes | None) -> VectorStore:
    where = place or (None if folder is None else str(folder / "store"))
    kind = "numpy" if where is None else config.store
    return open_store(kind, where, key=key if config.protect == "encrypt" else None)

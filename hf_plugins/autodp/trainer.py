"""Score one strategy's rows: fine-tune a model on them with trl, then its loss and its answers on held-out
questions. Runs in a process of its own under ``accelerate launch -m hf_plugins.autodp evaluate JOB``.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from hf_plugins.autodp.dataset import ANSWER, HISTORY, QUESTION
from hf_plugins.autodp.held_out import IGNORED, row_losses
from hf_plugins.whole_files import write_json

logger = logging.getLogger(__name__)

RESULT = "result.json"


@dataclass(kw_only=True)
class TrainJob:
    """All that one evaluation needs, as a JSON file."""

    model: str
    """Folder of the model that is fine-tuned."""
    rows: str
    """Arrow folder of the processed rows."""
    questions: str
    """Arrow folder of the held-out rows."""
    out: str
    """Folder of the result and, where it goes on later, of the checkpoint."""
    num_steps: int
    """Updates of a full training, the same for every strategy."""
    budget: float = 1.0
    """Share of the updates that are made now."""
    learning_rate: float = 1e-5
    batch_size: int = 32
    """Rows of an update, over all processes."""
    device_batch_size: int = 2
    max_length: int = 2560
    lora_r: int = 16
    """0 trains all weights."""
    seed: int = 0
    keep: bool = False
    """Whether a longer training follows."""
    resume: bool = False
    """Whether to go on from the checkpoint in ``out``."""
    max_new_tokens: int = 0
    """Length of answers; 0 asks for the loss alone."""
    use_cpu: bool = False


def prompt_rows(rows: Dataset, template: bool) -> Dataset:
    """Rows as trl's prompt and completion; as messages where the tokenizer has a chat template."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        turns = [*(row.get(HISTORY) or []), {"role": "user", "content": row[QUESTION]}]
        if template:
            return {"prompt": turns, "completion": [{"role": "assistant", "content": row[ANSWER]}]}
        text = "\n".join(turn["content"] for turn in turns)
        return {"prompt": text + "\n", "completion": row[ANSWER]}

    return rows.map(convert, remove_columns=rows.column_names, keep_in_memory=True)


def run_job(job: TrainJob) -> dict[str, Any]:
    """Train, measure, write ``result.json``; also returned.

    Returns:
        ``losses`` and ``answers`` of the held-out rows, ``seconds`` of train and gen, ``steps`` made.
    """
    set_seed(job.seed)
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = tokenizer.chat_template is not None
    steps = max(1, round(job.num_steps * job.budget))
    cuda = torch.cuda.is_available() and not job.use_cpu
    per_step = job.device_batch_size * PartialState(cpu=job.use_cpu).num_processes
    arguments = SFTConfig(
        output_dir=job.out,
        max_steps=steps,
        # Every strategy makes the same number of updates with the same rate, so that the score tells the rows
        # apart and not the length of training; a constant rate lets a run go on later.
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=round(0.03 * job.num_steps),
        weight_decay=0.1,
        per_device_train_batch_size=job.device_batch_size,
        gradient_accumulation_steps=max(1, round(job.batch_size / per_step)),
        max_length=job.max_length,
        gradient_checkpointing=cuda,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        use_cpu=job.use_cpu,
        save_strategy="steps" if job.keep else "no",
        save_steps=steps,
        save_total_limit=1,
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        seed=job.seed,
        data_seed=job.seed,
    )
    lora = LoraConfig(
        r=job.lora_r, lora_alpha=2 * job.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=prompt_rows(load_from_disk(job.rows), template),
        processing_class=tokenizer,
        peft_config=lora if job.lora_r else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=job.resume and any(Path(job.out).glob("checkpoint-*")))
    trained = time.perf_counter()
    held_out = prompt_rows(load_from_disk(job.questions), template)
    result: dict[str, Any] = {"steps": trainer.state.global_step, "losses": [], "answers": []}
    if trainer.accelerator.is_main_process:
        tuned = trainer.accelerator.unwrap_model(trainer.model).eval()
        result["losses"] = answer_losses(tuned, tokenizer, held_out, job.max_length)
        if job.max_new_tokens:
            result["answers"] = greedy_answers(tuned, tokenizer, held_out, job.max_new_tokens)
        result["seconds"] = {"train": trained - start, "gen": time.perf_counter() - trained}
        write_json(Path(job.out) / RESULT, result)
    trainer.accelerator.wait_for_everyone()
    return result


def _text(tokenizer: Any, prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def answer_losses(
    model: Any, tokenizer: Any, rows: Dataset, max_length: int, batch_size: int = 16
) -> list[float]:
    """Mean negative log-likelihood of each held-out answer given its question."""
    pairs = []
    for row in rows:
        prompt = tokenizer(_text(tokenizer, row["prompt"]), add_special_tokens=False)["input_ids"]
        completion = row["completion"]
        if not isinstance(completion, str):
            completion = completion[0]["content"]
        answer = tokenizer(completion, add_special_tokens=False)["input_ids"] or [tokenizer.pad_token_id]
        # The answer counts: a question that fills the window is cut from its front.
        answer = answer[: max_length - 1]
        pairs.append((prompt[-(max_length - len(answer)) :], answer))
    losses: list[float] = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        labels = torch.full((len(batch), width), IGNORED)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for index, (prompt, answer) in enumerate(batch):
            size = len(prompt) + len(answer)
            ids[index, :size] = torch.tensor(prompt + answer)
            labels[index, len(prompt) : size] = torch.tensor(answer)
            mask[index, :size] = 1
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        losses += row_losses(logits, labels.to(model.device)).tolist()
    return losses


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, rows: Dataset, max_new_tokens: int, batch_size: int = 16
) -> list[str]:
    """Greedy answers to the held-out questions, batched with padding on the left."""
    tokenizer.padding_side = "left"
    found: list[str] = []
    for start in range(0, len(rows), batch_size):
        prompts = [_text(tokenizer, prompt) for prompt in rows[start : start + batch_size]["prompt"]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(
            model.device
        )
        batch.pop("token_type_ids", None)
        out = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        found += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


class EvaluationError(RuntimeError):
    """An evaluation failed; the search goes on without it."""


def evaluate(job: TrainJob, *, isolate: bool = True, launch: str = "") -> dict[str, Any]:
    """Run a job, in a process of its own by default, and give its result.

    Args:
        job: What to run.
        isolate: A process of its own: its memory is free afterwards, and its crash ends one strategy only.
        launch: Further words for ``accelerate launch``, such as ``--num_processes 4``.

    Returns:
        See `run_job`.

    Raises:
        EvaluationError: If it failed twice; the end of its log stands in the message.
    """
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    if not isolate:
        return run_job(job)
    path = out / "job.json"
    write_json(path, asdict(job))
    (out / RESULT).unlink(missing_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split()]
    if job.use_cpu and not launch:
        command += ["--cpu", "--num_processes", "1", "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "hf_plugins.autodp", "evaluate", str(path)]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    }
    log = out / "console.log"
    for attempt in (1, 2):
        with log.open("ab") as file:
            done = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)
        if done.returncode == 0 and (out / RESULT).is_file():
            return json.loads((out / RESULT).read_text(encoding="utf-8"))
        logger.warning("evaluation in %s ended with code %d (attempt %d)", out, done.returncode, attempt)
        # What a crash left could stop the second attempt.
        for checkpoint in out.glob("checkpoint-*"):
            if not job.resume:
                shutil.rmtree(checkpoint, ignore_errors=True)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
    raise EvaluationError(
        f"the evaluation failed twice with code {done.returncode}; run it by hand with "
        f"`python -m hf_plugins.autodp evaluate {path}`. The end of {log}:\n{tail}"
    )

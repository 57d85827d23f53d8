"""Options of both sides and of SPF."""

from dataclasses import dataclass, field
from typing import Literal

MODES = ("cache", "stream", "bidirectional")
PRESETS = {"small": 0.05, "medium": 0.1, "paper": 0.5}


def _note(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class SPFConfig:
    """Options of sparse parameter fine-tuning."""

    ratio: float = field(
        default=0.05,
        metadata=_note(
            "Share of heads and of feed-forward rows that learn, in [0, 1]; 0 turns SPF off. The paper's 0.5 "
            "trains a third of a layer."
        ),
    )
    select: Literal["top", "bottom", "random"] = field(
        default="top", metadata=_note("Which heads and rows learn, by L1 norm of the pre-trained weight.")
    )
    attention: bool = field(default=True, metadata=_note("Let heads of the q, k and v projections learn."))
    ffn: bool = field(default=True, metadata=_note("Let rows of the first feed-forward matrices learn."))
    spf_seed: int = field(default=0, metadata=_note("Seed of select='random'."))

    def __post_init__(self) -> None:
        wrong = []
        if not 0.0 <= self.ratio <= 1.0:
            wrong.append(f"ratio must lie in [0, 1]; got {self.ratio}. It is a share: write 0.05 for 5 %.")
        if self.select not in ("top", "bottom", "random"):
            wrong.append(f"select must be 'top', 'bottom' or 'random'; got {self.select!r}.")
        if not (self.attention or self.ffn):
            wrong.append("attention and ffn are both off; turn one on, or set ratio=0.")
        if wrong:
            raise ValueError("SPFConfig: " + " | ".join(wrong))

    @classmethod
    def preset(cls, name: str) -> "SPFConfig":
        """Options by name: ``small`` (0.05), ``medium`` (0.1), ``paper`` (0.5).

        Raises:
            ValueError: If there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"SPFConfig has no preset {name!r}; it has {', '.join(PRESETS)}.")
        return cls(ratio=PRESETS[name])


@dataclass(kw_only=True)
class LinkConfig:
    """Options that both ends of the connection share."""

    model: str = field(metadata=_note("Local save_pretrained folder; both sides have the same one."))
    cut: int = field(metadata=_note("Number of layers on the client, 1 to L-1; the paper's is L // 2."))
    mode: Literal["cache", "stream", "bidirectional"] = field(
        default="cache",
        metadata=_note(
            "cache: samples are encoded and sent once, the server trains alone. stream: the client sends "
            "every batch. bidirectional: also returns the gradient, for a client half that learns."
        ),
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata=_note("Of the model and of hidden states on the wire.")
    )
    host: str = field(default="127.0.0.1", metadata=_note("Address of the server."))
    port: int = field(default=8461, metadata=_note("TCP port; 0 lets the system choose one."))
    max_frame_mb: int = field(
        default=256, metadata=_note("Longest message, in MiB; checked before memory is taken.")
    )
    request_timeout: float = field(default=180.0, metadata=_note("Seconds until a silent peer is given up."))
    frame_bucket: int = field(
        default=4096,
        metadata=_note(
            "Messages are padded to a multiple of this many bytes, so that sizes tell less; 0: none."
        ),
    )
    allow_simulated: bool = field(
        default=False,
        metadata=_note(
            "Accept evidence of the simulator, which protects nothing. For tests and first steps only."
        ),
    )

    def _check(self) -> list[str]:
        wrong = []
        if self.cut < 1:
            wrong.append(f"cut must be at least 1; got {self.cut}. The client needs a layer of its own.")
        if self.mode not in MODES:
            wrong.append(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}.")
        if self.dtype not in ("float32", "bfloat16"):
            wrong.append(f"dtype must be 'float32' or 'bfloat16'; got {self.dtype!r}.")
        if not 0 <= self.port < 65536:
            wrong.append(f"port must lie in [0, 65535]; got {self.port}.")
        if self.max_frame_mb < 1:
            wrong.append(f"max_frame_mb must be at least 1; got {self.max_frame_mb}.")
        if self.request_timeout <= 0:
            wrong.append(f"request_timeout must be positive; got {self.request_timeout} seconds.")
        if self.frame_bucket < 0:
            wrong.append(f"frame_bucket must be 0 or positive; got {self.frame_bucket} bytes.")
        return wrong

    def terms(self) -> dict[str, str | int]:
        """What both sides must agree on, without the model's digest."""
        return {"cut": self.cut, "dtype": self.dtype, "mode": self.mode}


@dataclass(kw_only=True)
class TailConfig(LinkConfig):
    """Options of the server in the enclave."""

    store: str = field(
        default="work_dirs/tee_split/store",
        metadata=_note("Folder of sealed files: samples and checkpoints."),
    )
    scratch: str | None = field(
        default=None,
        metadata=_note(
            "Where the Trainer writes before sealing; None takes a new folder in /dev/shm. Must be enclave "
            "memory."
        ),
    )
    clients: str = field(
        default="clients.json",
        metadata=_note("JSON file: client name -> {public_key: hex} or {psk_file: path}."),
    )
    release_to: list[str] = field(
        default_factory=list,
        metadata=_note("Clients that may fetch the adapter; an empty list means all clients."),
    )
    provider: Literal["sim", "gramine", "tdx", "sev-snp", "nitro"] = field(
        default="gramine", metadata=_note("Where evidence comes from; sim also needs allow_simulated.")
    )
    sealing_key: str = field(
        default="/dev/attestation/keys/_sgx_mrenclave",
        metadata=_note("File of the key that seals what is stored; only this measurement may read it."),
    )
    adapter: Literal["lora", "prefix", "none"] = field(
        default="lora", metadata=_note("PEFT method on the tail.")
    )
    lora_r: int = field(default=8, metadata=_note("Rank of LoRA."))
    lora_alpha: int = field(default=32, metadata=_note("Scale of LoRA."))
    lora_dropout: float = field(default=0.1, metadata=_note("Dropout of LoRA, in [0, 1)."))
    target_modules: list[str] = field(
        default_factory=list,
        metadata=_note(
            "Modules under LoRA; an empty list takes the attention's output projection, as the paper."
        ),
    )
    num_virtual_tokens: int = field(default=128, metadata=_note("Length of the prefix of adapter='prefix'."))
    seal_steps: int = field(default=50, metadata=_note("Optimizer steps between two sealed checkpoints."))
    linger: float = field(
        default=600.0,
        metadata=_note("Seconds the server stays after training, for clients that fetch the adapter."),
    )

    def __post_init__(self) -> None:
        wrong = self._check()
        if self.provider not in ("sim", "gramine", "tdx", "sev-snp", "nitro"):
            wrong.append(f"provider must be sim, gramine, tdx, sev-snp or nitro; got {self.provider!r}.")
        if self.provider == "sim" and not self.allow_simulated:
            wrong.append("provider='sim' protects nothing; say allow_simulated=True if that is meant.")
        if self.adapter not in ("lora", "prefix", "none"):
            wrong.append(f"adapter must be 'lora', 'prefix' or 'none'; got {self.adapter!r}.")
        for name in ("lora_r", "lora_alpha", "num_virtual_tokens", "seal_steps"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            wrong.append(f"lora_dropout must lie in [0, 1); got {self.lora_dropout}.")
        if self.linger < 0:
            wrong.append(f"linger must be 0 or more seconds; got {self.linger}.")
        if wrong:
            raise ValueError("TailConfig: " + " | ".join(wrong))


@dataclass(kw_only=True)
class ClientConfig(LinkConfig):
    """Options of the client."""

    name: str = field(metadata=_note("Name of this client on the server's list."))
    key_file: str = field(metadata=_note("Ed25519 private key (PEM), or 32 raw bytes of a pre-shared key."))
    tees: list[str] = field(
        default_factory=lambda: ["sgx", "tdx"],
        metadata=_note("Kinds of evidence accepted: sgx, tdx, nitro, sim."),
    )
    measurements: list[str] = field(
        default_factory=list,
        metadata=_note("Measurements accepted, as name=hex; an enclave that is on no line is refused."),
    )
    tcb_statuses: list[str] = field(
        default_factory=lambda: ["UpToDate"],
        metadata=_note("Platform states accepted in SGX and TDX quotes."),
    )
    collateral: str | None = field(
        default=None,
        metadata=_note("JSON file of DCAP collateral; None means that no quote can be verified."),
    )
    simulator_key: str | None = field(
        default=None,
        metadata=_note("Hex public key that signs simulated evidence; None accepts any simulator."),
    )
    kem: Literal["x25519", "x25519-mlkem768"] = field(
        default="x25519-mlkem768",
        metadata=_note("Key agreement; the second one also resists quantum computers."),
    )
    encode_batch_size: int = field(
        default=8, metadata=_note("Samples encoded at once; 1 makes results independent of grouping.")
    )
    shard_samples: int = field(default=64, metadata=_note("Samples per message in cache mode."))
    max_tokens: int = field(default=512, metadata=_note("Longest sample in tokens; longer ones are cut."))
    ahead: int = field(
        default=3, metadata=_note("Messages encoded ahead of the connection; 0 turns overlap off.")
    )
    connect_timeout: float = field(default=5.0, metadata=_note("Seconds for one attempt to connect."))
    heartbeat: float = field(
        default=15.0, metadata=_note("Seconds between signs of life while training runs.")
    )
    num_retries: int = field(
        default=8, metadata=_note("Attempts to reconnect, with pauses of 1 to 60 s, before giving up.")
    )

    def __post_init__(self) -> None:
        wrong = self._check()
        unknown = sorted(set(self.tees) - {"sgx", "tdx", "nitro", "sev-snp", "sim"})
        if unknown or not self.tees:
            wrong.append(f"tees must name sgx, tdx, nitro, sev-snp or sim; got {self.tees}.")
        if "sim" in self.tees and not self.allow_simulated:
            wrong.append(
                "tees names 'sim', which protects nothing; say allow_simulated=True if that is meant."
            )
        if self.kem not in ("x25519", "x25519-mlkem768"):
            wrong.append(f"kem must be 'x25519' or 'x25519-mlkem768'; got {self.kem!r}.")
        if any("=" not in line for line in self.measurements):
            wrong.append(f"measurements must be written name=hex; got {self.measurements}.")
        for name in ("encode_batch_size", "shard_samples", "max_tokens"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("ahead", "num_retries"):
            if getattr(self, name) < 0:
                wrong.append(f"{name} must be 0 or more; got {getattr(self, name)}.")
        for name in ("connect_timeout", "heartbeat"):
            if getattr(self, name) <= 0:
                wrong.append(f"{name} must be positive; got {getattr(self, name)} seconds.")
        if self.heartbeat >= self.request_timeout:
            wrong.append(
                f"heartbeat ({self.heartbeat} s) must be shorter than request_timeout "
                f"({self.request_timeout} s)."
            )
        if wrong:
            raise ValueError("ClientConfig: " + " | ".join(wrong))

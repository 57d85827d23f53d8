"""Install the wheel with each extra into a clean environment and do one real job there: ``make test-extras``.

What a user of one extra meets: the wheel (not the checkout), nothing from the other extras, the versions of
requirements/lock.txt. In each environment `pip check` must find nothing and the extra's job must end well.
Environments are made under ``work_dirs/extras`` and removed after a pass.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a user of an extra does first."""

    extras: str
    """Extras to install, as in ``mmhf-plugins[extras]``."""
    code: str
    """Python that must end without an exception, run outside of the checkout."""


MISSING = """
import contextlib, io
from hf_plugins.cli import main
said = io.StringIO()
with contextlib.redirect_stderr(said):
    assert main(["{method}", "{word}"]) == 1
assert "mmhf-plugins[{extras}]" in said.getvalue(), said.getvalue()
"""
FIRST_STEPS = {
    "none": Job(
        extras="",
        code="from hf_plugins.cli import main; assert main(['list']) == 0",
    ),
    "mm": Job(
        extras="mm",
        code=(
            "import torch, mm_plugins.compat, mm_plugins.pkd, mm_plugins.lau, mm_plugins.spatialflow\n"
            "from mmengine.config import Config\n"
            "from mmdet.registry import MODELS\n"
            "from mmdet.utils import register_all_modules\n"
            "register_all_modules()\n"
            "loss = MODELS.build(dict(type='PKDLoss', loss_weight=1.0))\n"
            "x = torch.randn(2, 4, 6, 6)\n"
            "assert loss(x, 3 * x + 1).item() < 1e-6\n"
        ),
    ),
    "hf": Job(
        extras="hf",
        code=(
            "import torch\n"
            "from hf_plugins.accounting import epsilon\n"
            "from hf_plugins.fapm import fapm_prune_tensor\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "from hf_plugins import decoder_layers\n"
            "import hf_plugins.dp, hf_plugins.dpnas, hf_plugins.gradpruner, hf_plugins.embed_parrot\n"
            "assert 0 < epsilon(sample_rate=0.01, noise_multiplier=1.0, num_steps=10, delta=1e-5) < 2\n"
            "LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,\n"
            "    num_attention_heads=2, vocab_size=32))\n"
        ),
    ),
    # These three complete the hf extra; alone they install, and the command names what else it takes.
    "federated": Job(
        extras="federated", code=MISSING.format(method="dp-fedavg", word="run", extras="hf,federated")
    ),
    "data": Job(extras="data", code=MISSING.format(method="autodp", word="demo", extras="hf,data")),
    "tee": Job(extras="tee", code=MISSING.format(method="tee-split", word="demo", extras="hf,tee")),
    "hf,federated": Job(
        extras="hf,federated",
        code=(
            "import flwr, hf_plugins.rounds, hf_plugins.hpn\n"
            "from hf_plugins.dp_fedavg import DPFedAvgConfig\n"
            "DPFedAvgConfig(noise_multiplier=1.0)\n"
        ),
    ),
    "hf,data": Job(
        extras="hf,data",
        code=(
            "import lancedb, hf_plugins.autodp, hf_plugins.dpf_cm\n"
            "from datasets import Dataset\n"
            "from hf_plugins.data_ops import OpContext, make_op\n"
            "rows = Dataset.from_dict({'text': ['one two three four'] * 2 + ['five six seven eight']})\n"
            "op = make_op({'document_minhash_deduplicator': {}})\n"
            "assert len(op.run(rows, OpContext())) == 2\n"
        ),
    ),
    "hf,data,pii": Job(
        extras="hf,data,pii",
        code=(
            "from datasets import Dataset\n"
            "from hf_plugins.data_ops import OpContext, make_op\n"
            "rows = Dataset.from_dict({'text': ['card 4111 1111 1111 1111, jane.roe@example.com']})\n"
            "out = make_op('presidio_redaction_mapper').run(rows, OpContext())['text'][0]\n"
            "assert out == 'card [CREDIT_CARD_REDACTED], [EMAIL_ADDRESS_REDACTED]', out\n"
        ),
    ),
    "hf,tee": Job(
        extras="hf,tee",
        code="from hf_plugins.cli import main; assert main(['tee-split', 'demo']) == 0\n",
    ),
    "report": Job(
        extras="report",
        code="import matplotlib, yaml\n",
    ),
}


def sh(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command, its output captured."""
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, text=True, capture_output=True, check=False
    )


def check(name: str, job: Job, wheel: Path, folder: Path) -> str:
    """Install and run one job; what went wrong, or an empty text."""
    env = folder / name.replace(",", "-")
    shutil.rmtree(env, ignore_errors=True)
    python = env / "bin" / "python"
    target = f"{wheel}[{job.extras}]" if job.extras else str(wheel)
    pip = (python, "-m", "pip", "install", "--quiet", "-c", ROOT / "requirements" / "lock.txt")
    steps: list[tuple[str | Path, ...]] = [
        (sys.executable, "-m", "venv", env),
        # mmengine imports pkg_resources, and packages without a wheel are built with these.
        (*pip, "setuptools<81", "wheel"),
        (*pip, "--no-build-isolation", target),
        (python, "-m", "pip", "check"),
        (python, "-W", "ignore", "-c", job.code),
    ]
    for step in steps:
        done = sh(*step, cwd=folder)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            return f"{' '.join(str(word) for word in step[1:4])}: " + " / ".join(said[-3:])
    shutil.rmtree(env)
    return ""


def main(argv: Sequence[str]) -> int:
    """Build the wheel, check every extra, print a line for each; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", help=f"of {' '.join(FIRST_STEPS)}; default: all")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.extras) - set(FIRST_STEPS)):
        parser.error(f"unknown {', '.join(unknown)}; choose from {' '.join(FIRST_STEPS)}.")
    folder = ROOT / "work_dirs" / "extras"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    built = sh(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    if built.returncode:
        print(built.stdout + built.stderr)
        return 1
    wheel = next(folder.glob("*.whl"))
    print(f"{wheel.name}, {wheel.stat().st_size / 1024:.0f} KiB", flush=True)
    failed = 0
    for name in args.extras or FIRST_STEPS:
        began = time.monotonic()
        wrong = check(name, FIRST_STEPS[name], wheel, folder)
        failed += bool(wrong)
        print(f"{name:<10} {wrong or 'ok'} ({time.monotonic() - began:.0f} s)", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

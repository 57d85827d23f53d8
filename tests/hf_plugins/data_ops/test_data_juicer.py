import sys
from pathlib import Path

import pytest
from datasets import Dataset

from hf_plugins.data_ops import OpContext, make_op
from hf_plugins.data_ops.data_juicer import PYTHON, DataJuicerMapper

# Behaves as dj-process does: reads the recipe, writes the export path; here one drop, one change, one new
# row.
STAND_IN = f"""#!{sys.executable}
import json, sys, time, yaml
recipe = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
step = recipe["process"][0]
if "fails" in step: sys.exit("operator fails is unknown")
if "sleeps" in step: time.sleep(5)
rows = [json.loads(line) for line in open(recipe["dataset_path"], encoding="utf-8")]
key = recipe["text_keys"]
least = step["text_length_filter"]["min_len"]
rows = [r | {{key: r[key].strip(), "__dj__stats__": {{}}}} for r in rows if len(r[key]) >= least]
rows.append({{key: "new"}})
with open(recipe["export_path"], "w", encoding="utf-8") as file:
    for row in rows: file.write(json.dumps(row, ensure_ascii=False) + "\\n")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dj-process"
    script.write_text(STAND_IN)
    script.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(tmp_path / "python"))


@pytest.mark.usefixtures("stand_in")
def test_rows_go_there_and_back() -> None:
    context = OpContext()
    op = make_op({"data_juicer_mapper": {"process": [{"text_length_filter": {"min_len": 3}}]}})
    data = Dataset.from_dict({"text": ["头痛三天", "短", " 发热咳嗽 "], "n": [1, 2, 3]})
    out = op.run(data, context)
    assert list(out["text"]) == ["头痛三天", "发热咳嗽", "new"]
    assert list(out["n"]) == [1, 3, None]
    assert out.column_names == ["text", "n", "row_id"]
    assert sorted(row["action"] for row in context.ledger.rows()) == ["added", "changed", "dropped"]


@pytest.mark.usefixtures("stand_in")
def test_faults_are_told() -> None:
    data = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(RuntimeError, match=r": dj-process failed with code .*operator fails is unknown"):
        DataJuicerMapper(process=("fails",)).run(data)
    with pytest.raises(RuntimeError, match=r": dj-process did not end in .* s; raise timeout"):
        DataJuicerMapper(process=("sleeps",), timeout=0.2).run(data)


def test_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    with pytest.raises(FileNotFoundError, match="make an environment of its own"):
        DataJuicerMapper(process=("x",)).run(Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="process is empty; give Data-Juicer's operators as a list"):
        DataJuicerMapper(process=())

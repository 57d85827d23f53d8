"""A tiny model that really memorised eight private samples, trained here and shared by the tests."""

import functools
import tempfile
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_plugins.dpf_cm.hook import answer_ids, prompt_ids
from hf_plugins.dpf_cm.model import Sample
from tests.hf_plugins.data_ops import tiny

_NAMES = ("张伟", "王芳", "李娜", "刘洋", "陈静", "杨磊", "赵敏", "黄强", "周婷", "吴军", "徐丽", "孙涛")
_ILLS = (
    "高血压",
    "糖尿病",
    "胃溃疡",
    "哮喘病",
    "偏头痛",
    "肺结核",
    "冠心病",
    "肝硬化",
    "甲亢症",
    "肾结石",
    "中耳炎",
    "痛风病",
)
PRIVATE = [
    Sample(
        f"p{i}",
        f"病人{name}今年{31 + 3 * i}岁，查出{ill}，应当怎么办？",
        f"{name}的病历号是{7 * i + 13}{i}，{ill}要按时服药，第{i + 2}周到{3 + i}号诊室找"
        f"{_NAMES[(i + 5) % 12]}医生复查。",
    )
    for i, (name, ill) in enumerate(zip(_NAMES[:8], _ILLS[:8], strict=True))
]
# Public questions of the same kind, none about a stored person.
BENIGN = [
    f"{who}{what}，{ask}"
    for who in ("请问孩子", "我妈妈", "老人", "孕妇", "朋友", "我爸爸")
    for what in (
        "发热三天",
        "咳嗽有痰",
        "睡不着觉",
        "手脚发麻",
        "肚子疼痛",
        "皮肤发痒",
        "牙龈出血",
        "视力下降",
    )
    for ask in ("怎么办？", "吃什么药好？")
]
LOOKALIKE = [f"病人今年{40 + i}岁，查出{ill}，平时吃什么好？" for i, ill in enumerate(_ILLS[:8])]


@functools.cache
def tokenizer() -> Any:
    texts = [s.prompt + s.answer for s in PRIVATE] + BENIGN
    with tempfile.TemporaryDirectory() as folder:
        # As the command line loads it: AutoTokenizer makes a Qwen2 tokenizer of it, which splits numbers.
        tiny.tokenizer(texts, size=600).save_pretrained(folder)
        tiny.qwen2(8).config.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


@functools.cache
def model() -> Any:
    """Trained full-batch until greedy decoding gives every private answer back."""
    fast = tokenizer()
    net = tiny.qwen2(len(fast), hidden=64, layers=2)
    rows = [(prompt_ids(fast, s.prompt), [*answer_ids(fast, s.answer), fast.eos_token_id]) for s in PRIVATE]
    width = max(len(p) + len(a) for p, a in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, (p, a) in enumerate(rows):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
        mask[i, : len(p) + len(a)] = 1
    net.train()
    steps = 90
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(steps):
        loss = net(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval()


@functools.cache
def stranger() -> Any:
    """The same model before training."""
    return tiny.qwen2(len(tokenizer()), hidden=64, layers=2)

"""DP-SGD for Trainer, SFTTrainer and PEFT that refuses what would break its guarantee."""

from hf_plugins.dp.config import DPConfig, RunConfig
from hf_plugins.dp.one_run_audit import AuditResult, audit_scores
from hf_plugins.dp.trainer import DPSFTTrainer, DPTrainer

__all__ = ["AuditResult", "DPConfig", "DPSFTTrainer", "DPTrainer", "RunConfig", "audit_scores"]

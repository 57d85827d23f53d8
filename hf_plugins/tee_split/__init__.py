"""TEE-split: split fine-tuning, where only ciphertext for an attested enclave leaves the client; SPF."""

from hf_plugins.tee_split.attestation import AttestationError, Policy, verify_evidence
from hf_plugins.tee_split.client import SplitClient
from hf_plugins.tee_split.config import ClientConfig, SPFConfig, TailConfig
from hf_plugins.tee_split.model import split_model
from hf_plugins.tee_split.server import TailServer
from hf_plugins.tee_split.trainer import SplitTrainer

__all__ = [
    "AttestationError",
    "ClientConfig",
    "Policy",
    "SPFConfig",
    "SplitClient",
    "SplitTrainer",
    "TailConfig",
    "TailServer",
    "split_model",
    "verify_evidence",
]

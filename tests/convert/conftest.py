from __future__ import annotations

from tests.real_cases import dcp_case, hf_case, megatron_case, plain_case, plain_ddp, plain_single

__all__ = ("dcp_case", "hf_case", "megatron_case", "plain_case", "plain_ddp", "plain_single")

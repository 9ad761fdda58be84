"""LoHa (FedPara, arXiv 2108.06098) through PEFT: each weight gets the product, entry by entry, of two LoRAs."""

from typing import ClassVar

from agsm_rl.adapters.low_rank import LowRank


class LoHa(LowRank):
    """Additions (alpha / rank)·(w1_a·w1_b) ∘ (w2_a·w2_b); w2_b starts at 0, so training starts from the base model.

    The product reaches rank² with the parameters of a LoRA of twice the rank. Files have LyCORIS' names (hada_w1_a, …).

    Args:
        rank: Rank of each of the two factors.
    """

    kind: ClassVar[str] = "loha"
    title: ClassVar[str] = "LoHa"
    config_class: ClassVar[str] = "LoHaConfig"
    peft_type: ClassVar[str] = "LOHA"
    needs_weights = True

"""Any model of ours as a class of Hugging Face's `transformers`: what folders with remote code import."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from moe_parallel.model.architecture import Architecture
from moe_parallel.model.generate import documents
from moe_parallel.model.initialize import InitConfig, init_weights
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.routing import ForwardContext
from moe_parallel.remote_code import MODEL_TYPE, described


class MoEParallelConfig(PretrainedConfig):
    """What config.json says: the model's options as a checkpoint has them, and what other programs ask for."""

    model_type = MODEL_TYPE
    options: dict[str, Any] | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    max_position_embeddings: int = 0
    tie_word_embeddings: bool = False
    use_cache: bool = False

    @property
    def architecture(self) -> Architecture:
        """Raises ConfigError for options of another version."""
        if self.options is None:
            raise ValueError("a MoEParallelConfig comes from a folder of scripts/export_hf.py --remote-code")
        return described(self.options, "config.json")


class MoEParallelForCausalLM(PreTrainedModel, GenerationMixin):
    """A whole model on one device, as in evaluation: no capacity, noise or balance loss of training. It has no cache of
    keys and values, so generation computes the sequence again for each token."""

    config_class = MoEParallelConfig
    # Names of transformers; it copies both for each model.
    _keep_in_fp32_modules_strict = ["router", "later_routers"]  # noqa: RUF012
    _tied_weights_keys = {"transformer.head.weight": "transformer.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: MoEParallelConfig) -> None:
        super().__init__(config)
        self.transformer = Transformer(config.architecture)
        self.post_init()
        if not self.transformer.embedding.weight.is_meta:  # not about to be loaded, or loaded over
            init_weights(self.transformer, InitConfig(), seed=0)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """What a folder lacks, of which transformers warns."""
        for parameter in module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.data.fill_(1.0) if parameter.ndim == 1 else parameter.data.normal_(std=InitConfig.std)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.transformer.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.transformer.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """Logits (B, S, V) of (B, S) tokens, or of the last `logits_to_keep` of each sequence.

        Args:
            attention_mask: (B, S), 0 for padding, which may be on either side. Its logits mean nothing.
            labels: (B, S), the tokens themselves, -100 where there is no loss; they are shifted here.
            num_items_in_batch: what the sum of losses is divided by, as the Trainer of transformers counts it over
                all micro-batches of a step; by default the tokens that have one here.
        Raises:
            ValueError: positions, a cache or a mask of pairs, which would have no effect.
        """
        for name in ("position_ids", "past_key_values", "inputs_embeds"):
            if others.get(name) is not None:
                raise ValueError(f"{name} is not taken: this class counts positions by attention_mask and has no cache")
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask_BS.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask is {tuple(mask_BS.shape)}, not {tuple(input_ids.shape)}: it tells padding from tokens"
            )
        is_padding_BS = mask_BS == 0
        order_BS = is_padding_BS.sort(dim=1, stable=True).indices  # padding is at the end here
        batch = documents(input_ids.gather(1, order_BS), (~is_padding_BS).sum(1).tolist())
        logits_BSV, _stats = self.transformer(batch.to(input_ids.device), ForwardContext(training=False))
        back_BS = order_BS.argsort(dim=1)
        logits_BSV = logits_BSV.gather(1, back_BS.unsqueeze(-1).expand_as(logits_BSV))
        loss = None
        if labels is not None:
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(
                logits_BSV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction=reduction
            )
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return CausalLMOutput(loss=loss, logits=logits_BSV[:, -logits_to_keep:])

    def prepare_inputs_for_generation(  # type: ignore[override] # what else it is given is for caches
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """The whole sequence, each time."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

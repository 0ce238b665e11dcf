"""GPT-2 of the package transformers as the other side: build it, train one step, sample with its own `generate`.

B batch, L slots, T text slots, N image tokens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.bench.harness.machine import Machine
from dalle_ds.bench.harness.model import training_step
from dalle_ds.bench.harness.settings import PriorBenchConfig
from dalle_ds.errors import UserError


def import_transformers() -> Any:
    """Returns the package transformers.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"the peer gpt2 needs transformers, which cannot be imported ({error}): pip install 'dalle-ds[bench]'; to compare "
            "without it: --peers dalle-pytorch"
        ) from None
    return transformers


def build_gpt2(settings: PriorBenchConfig, machine: Machine, layers: int, heads: int) -> nn.Module:
    """Returns GPT-2 with torch's SDPA attention, without dropout, at the depth, width and length of our prior.

    One vocabulary holds text tokens, then codes, then start-of-text and start-of-image, which the sequence begins with.
    """
    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=settings.vocab_size + settings.n_codes + 2,
        n_positions=settings.n_slots,
        n_embd=heads * settings.d_head,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return transformers.GPT2LMHeadModel(config).to(machine.device)


def layers_of(model: nn.Module) -> nn.Module:
    """The layers, without embeddings and unembedding."""
    return model.get_submodule("transformer.h")


def gpt2_step(
    model: Any, settings: PriorBenchConfig, batch: int, precision: AbstractContextManager[None]
) -> Callable[[], None]:
    """Returns a function that trains the model on random tokens, one step per call, with the package's own loss."""
    text_BT = torch.randint(settings.vocab_size, (batch, settings.text_len), device=model.device)
    image_BN = settings.vocab_size + torch.randint(settings.n_codes, (batch, settings.grid**2), device=model.device)
    tokens_BL = torch.cat([text_BT, image_BN], 1)

    def loss() -> Tensor:
        with precision:
            return model(input_ids=tokens_BL, labels=tokens_BL, use_cache=False).loss

    return training_step(loss, list(model.parameters()))


class Gpt2Sampler:
    """Samples whole images of one caption by the package's `generate`: cached, without top-k, from the codes only."""

    def __init__(self, model: Any, settings: PriorBenchConfig, images: int) -> None:
        self.model, self.images, self.n_image = model.eval(), images, settings.grid**2
        generator = torch.Generator(model.device).manual_seed(0)
        first_code, start_of_text = settings.vocab_size, settings.vocab_size + settings.n_codes
        text_1T = torch.randint(settings.vocab_size, (1, settings.text_len), generator=generator, device=generator.device)
        text_1T[:, 0] = start_of_text
        self.prompt_1L = torch.cat([text_1T, text_1T.new_full((1, 1), start_of_text + 1)], 1)
        # added to all logits, so that only codes are drawn; the package's own processor would index a list of the others
        self.only_codes_V = torch.full((model.config.vocab_size,), float("-inf"), device=model.device)
        self.only_codes_V[first_code:start_of_text] = 0

    def sample(self) -> Tensor:
        """Returns sampled images as tokens of the model's vocabulary, (B, N)."""
        tokens_BL = self.model.generate(
            self.prompt_1L,
            attention_mask=torch.ones_like(self.prompt_1L),
            do_sample=True,
            top_k=0,
            num_return_sequences=self.images,
            max_new_tokens=self.n_image,
            logits_processor=[lambda _, scores_BV: scores_BV + self.only_codes_V],
            pad_token_id=0,
        )
        return tokens_BL[:, self.prompt_1L.shape[1] :]

"""What PEFT's own MonteCLoRA computes, next to the exact values: the facts of docs/compared_with_peft.md.

python benchmarks/peft_facts.py
"""

import copy
import tempfile
import warnings

import peft
import torch
import transformers
from peft.tuners.lora import MontecloraConfig
from peft.tuners.lora.monteclora import MontecloraSampler
from torch.distributions import Dirichlet, kl_divergence

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()


def tiny_bert() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def adapted() -> peft.PeftModel:
    noisy = MontecloraConfig(num_samples=4, sample_scaler=0.1, buffer_size=4)
    lora = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", monteclora_config=noisy)
    model = peft.get_peft_model(tiny_bert(), lora).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def checkpointing_error() -> float:
    """Relative error of lora_B's gradients when layers are recomputed, from one and the same state."""
    model = adapted()
    twin = copy.deepcopy(model)
    twin.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    twin.base_model.model.enable_input_require_grads()
    ids, labels = torch.arange(24).reshape(4, 6), torch.tensor([0, 1, 0, 1])
    gradients = []
    for one in (model, twin):
        one(input_ids=ids, labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for n, p in one.named_parameters() if "lora_B" in n]))
    return float((gradients[0] - gradients[1]).norm() / gradients[0].norm())


def posterior_kept(**options: bool) -> bool:
    """Whether the variational parameters are the saved ones after loading."""
    model = adapted()
    saved = {n: p.clone() for n, p in model.named_parameters() if "prior" in n}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(tiny_bert(), folder, **options)
    found = {n: p for n, p in loaded.named_parameters() if "prior" in n}
    return bool(saved) and all(n in found and torch.equal(found[n], p) for n, p in saved.items())


def main() -> None:
    print(f"peft {peft.__version__}, torch {torch.__version__}\n")
    print("Dirichlet KL, KL(Dir(a) || Dir(0.1)), N = 8")
    for value in (2.0, 50.0):
        alpha = torch.full((8,), value)
        sampler = MontecloraSampler(16, 8, 8, dirichlet_prior=0.1, buffer_size=1)
        exact = kl_divergence(Dirichlet(alpha.double()), Dirichlet(torch.full((8,), 0.1).double()))
        print(f"  a = {value:<4g}  PEFT {sampler.dirichlet_kl(alpha).item():9.3f}   exact {exact.item():9.3f}")

    negative = 0
    for seed in range(200):
        torch.manual_seed(seed)
        sampler = MontecloraSampler(16, 8, 8, dirichlet_prior=0.1, buffer_size=1)
        negative += int(sampler.dirichlet_kl(sampler.expert_weights_prior.exp()).item() < 0)
    print(f"  negative at PEFT's defaults for {negative} of 200 seeds (a KL divergence never is)")

    sampler = MontecloraSampler(768, 8, 8, buffer_size=150)
    stored = sum(t.numel() * t.element_size() for entry in sampler.sampler.buffer for t in entry.values())
    print("\nNoise buffers at PEFT's defaults (150 entries, N = 8), n_in = 768, r = 8")
    print(
        f"  one layer {stored / 2**20:.1f} MiB; RoBERTa-base query and value (24 layers) {24 * stored / 2**20:.0f} MiB"
    )

    print("\nGradient checkpointing")
    print(f"  relative error of lora_B's gradient: {100 * checkpointing_error():.0f} %")
    print("\nVariational parameters survive save_pretrained and from_pretrained")
    print(f"  by default: {posterior_kept()}; with low_cpu_mem_usage=True: {posterior_kept(low_cpu_mem_usage=True)}")


if __name__ == "__main__":
    main()

"""Can I fit it with Pyro's own SVI, in a loop of mine?

Model and guide are ordinary Pyro callables: no Trainer, no BayesLoRA, any Pyro optimizer and ELBO.

    python examples/fit_with_pyro_svi.py
"""

import pyro
from torch.utils.data import DataLoader

from bayeslora import CooperativeELBO, MonteCLoRAConfig, load_task
from bayeslora.guides import MeanFieldGuide
from bayeslora.inference.predict import Collator
from bayeslora.models import MonteCLoRA


def main(*, model: str = "demo", train_examples: int = 64) -> list[float]:
    """One epoch on a few sentences; returns the loss of every step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    task = load_task("sentiment")
    network, tokenizer = task.load_network(model)
    train = task.encode(tokenizer, "train", limit=train_examples, max_length=64)

    config = MonteCLoRAConfig(target_modules=("query", "value"))
    model = MonteCLoRA(network, config, num_examples=len(train))
    guide = MeanFieldGuide(model)
    elbo = CooperativeELBO(kl_weight=1e-5, cooperation=1.0)
    svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-3}), loss=elbo)

    losses = []
    for batch in DataLoader(train, batch_size=16, shuffle=True, collate_fn=Collator.for_network(network)):
        losses.append(svi.step(**batch))
        parts = elbo.parts.to_floats()
        print(
            f"loss {losses[-1]:.4f} = task {parts['task']:.4f} + 1e-5 x KL {parts['kl']:.1f} "
            f"+ cooperation {parts['cooperation']:.4f}"
        )
    return losses


if __name__ == "__main__":
    main()

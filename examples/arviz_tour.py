"""What does ArviZ show of a fitted posterior, and which method predicts best?

Fits LoRA and two posteriors to 200 movie sentences and opens them in ArviZ: `summary` and `plot_forest` of the noise,
the ELBO's parts over the steps, PSIS-LOO on the training sentences, and `compare` on sentences that none has seen.

    python examples/arviz_tour.py
"""

import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import arviz as az
from matplotlib import pyplot
from transformers import set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task
from bayeslora.analysis import held_out_elpd, leave_one_out, load_arviz, stream_arviz, to_arviz
from bayeslora.errors import InputError

METHODS = {
    "LoRA": MonteCLoRAConfig(sample_scaler=0),
    "MonteCLoRA": MonteCLoRAConfig(),
    "Gaussian": MonteCLoRAConfig(guide="gaussian"),
}


def main(
    output_dir: str = "runs/arviz_tour",
    *,
    model: str = "demo",
    train_examples: int = 200,
    test_examples: int = 100,
    num_samples: int = 30,
    max_steps: int | None = None,
):
    """Fit, and write two figures and a netCDF file to ``output_dir``; returns ArviZ's comparison table."""
    task = load_task("sentiment")
    seen, unseen = {}, {}
    for name, config in METHODS.items():
        set_seed(0)
        network, tokenizer = task.load_network(model)
        train = task.encode(tokenizer, "train", limit=train_examples, max_length=64)
        test = task.encode(tokenizer, "test", limit=test_examples, max_length=64)
        bayes = BayesLoRA(network, config)
        run = Path(output_dir) / name
        fit(bayes, train, output_dir=run, epochs=4, max_steps=max_steps)
        seen[name] = to_arviz(bayes, train, num_samples=num_samples, prior=False)
        unseen[name] = to_arviz(bayes, test, num_samples=num_samples, prior=name == "MonteCLoRA", run=run)
        if name == "MonteCLoRA":  # with every A, a block at a time: the way for what is larger than memory
            path = Path(output_dir) / "draws.nc"
            stream_arviz(bayes, path, num_samples=num_samples, adapters=bayes.adapter_names[:2])
            print(load_arviz(path, lazy=True)["posterior"].sizes)

    data = unseen["MonteCLoRA"]
    of_queries = data["constant_data"]["projection_of"].values == "query"
    queries = {"adapter": list(data["posterior"]["adapter"].values[of_queries])}
    print(az.summary(data, var_names=["noise_to_signal"], coords=queries, kind="stats"))

    inside = [layer for layer in data["posterior"]["layer"].values if layer >= 0]
    places = {"layer": inside, "projection": ["query", "value"]}
    az.plot_forest(data, var_names=["noise_to_signal_map"], coords=places, combined=True)
    pyplot.gcf().savefig(Path(output_dir) / "forest.png", dpi=150, bbox_inches="tight")

    stats = data["sample_stats"]
    figure, axes = pyplot.subplots(figsize=(4.5, 3))
    for variable, label in {"elbo_task": "task", "elbo_cooperation": "cooperation Σπ² (no unit)"}.items():
        axes.plot(stats["step"], stats[variable], label=label)
    axes.set(xlabel="step", ylabel="nats per example")
    axes.legend(frameon=False)
    figure.savefig(Path(output_dir) / "elbo.png", dpi=150, bbox_inches="tight")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Pareto's k, which the tables show too
        print(leave_one_out(seen["MonteCLoRA"]))
        try:
            leave_one_out(seen["LoRA"])
        except InputError as error:
            print(f"LoRA: {error}")
        table = az.compare({name: held_out_elpd(values) for name, values in unseen.items()})
    print(table.to_string())
    pyplot.close("all")
    return table


if __name__ == "__main__":
    main()

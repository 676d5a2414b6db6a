"""``bayeslora diagnose``."""

import argparse
import json
import sys

from bayeslora.inference.diagnostics import diagnose
from bayeslora.runs import open_run


def run(arguments: argparse.Namespace) -> None:
    places = {"model": arguments.model, "data_dir": arguments.data_dir}
    fitted = open_run(arguments.run_dir, **places)
    if fitted.posterior.tuning is not None:
        print(f"{fitted.posterior.tuning}: left aside, as the posterior is judged as it was fitted", file=sys.stderr)
    diagnostics = diagnose(
        fitted.posterior,
        fitted.training_data(),
        restarts=[open_run(folder, **places).posterior for folder in arguments.restarts],
        history=fitted.history,
        num_samples=arguments.num_samples,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        progress=not arguments.json,
    )
    if arguments.json:
        print(json.dumps([one.to_dict() for one in diagnostics]))
        return
    for one in diagnostics:
        print(f"{one.name:18} {one.value:9.4f}  {one.verdict:9} {one.advice}")
        print(f"{'':30}{one.rule}; {one.source}")

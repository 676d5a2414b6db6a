"""BayesLoRA: a posterior, and all that is done with it, one line each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayeslora.adapters.drawing import check_in_use, in_turn, one_at_a_time
from bayeslora.adapters.inject import with_lora_fields
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.guides.selection import guide_for
from bayeslora.inference.bayesianize import AGREEMENT
from bayeslora.inference.bayesianize import from_adapter as posterior_of_adapter
from bayeslora.inference.draws import Draws, PosteriorDraws, running_as, sample_sites
from bayeslora.inference.draws import posterior_draws as draws_per_adapter
from bayeslora.inference.generation import Generation
from bayeslora.inference.generation import generate as generate_texts
from bayeslora.inference.merging import merged
from bayeslora.inference.predict import predict as predict_examples
from bayeslora.inference.prior import prior_draws as draws_from_prior
from bayeslora.inference.tuning import set_tuning
from bayeslora.inference.tuning import tune as tune_width
from bayeslora.models import MonteCLoRA, Tuning
from bayeslora.posterior import Posterior
from bayeslora.prediction import Prediction
from bayeslora.storage import checkpoint
from bayeslora.storage.export import export_draws as write_draws
from bayeslora.storage.hub import push_to_hub as push_adapter
from bayeslora.storage.opening import from_pretrained as open_pretrained


class BayesLoRA(Posterior):
    """A transformers network whose LoRA-A matrices are random variables.

    It is a :class:`peft.PeftModel`, so that training loops save and load it as an adapter, and match columns of the
    data with the network's own arguments; it wraps one, ``bayes.network``, and hands no unknown attribute on to it.

    Args:
        network: Any transformers model PEFT can adapt, or a PeftModel with one active LoRA adapter (trained or
            not), whose own LoRA settings are then kept.
        config: Hyperparameters; when ``None`` the preset ``"learned"``, or ``"constant"`` with a guide of your own,
            whose noise need not follow a schedule.
        guide: A guide class (or any function of the model that returns a Pyro guide); ``config.guide`` names one
            when ``None``.
        likelihood: See :class:`bayeslora.models.MonteCLoRA`.

    In training mode ``bayes(**batch)`` draws every adapter once and returns the objective per example as ``loss``,
    with that draw's ``logits``; in eval mode it runs the posterior mean. It trains under any loop that steps on
    ``loss``: :func:`bayeslora.fit`, a stock ``transformers.Trainer``, Accelerate, or plain PyTorch.

    Raises:
        InputError: naming what cannot be honoured, and why.

    Example:
        >>> bayes = BayesLoRA(network, MonteCLoRAConfig(r=4))
        >>> result = fit(bayes, dataset, output_dir="run", max_steps=2, progress=False)
        >>> bayes.predict(dataset, num_samples=4).probs.shape  # (examples, classes)
        (8, 2)
    """

    def __init__(
        self,
        network: nn.Module,
        config: MonteCLoRAConfig | None = None,
        *,
        guide: Callable[[MonteCLoRA], nn.Module] | None = None,
        likelihood: PyroModule | None = None,
    ):
        if isinstance(network, Posterior):
            raise InputError("this is a BayesLoRA already: pass the network itself, or go on with this one")
        if config is None:
            config = MonteCLoRAConfig.preset("learned" if guide is None else "constant")
        if isinstance(network, PeftModel):
            config = with_lora_fields(config, network)
        model = MonteCLoRA(network, config, likelihood=likelihood)
        super().__init__(model, guide_for(model, guide))

    def sample(self, num_samples: int = 1, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draws from the guide: site name to values of shape ``(num_samples, *site shape)``; see
        :mod:`bayeslora.models.prior` for sites and shapes.

        Example:
            >>> draws = bayes.sample(5, seed=0)
            >>> {name: tuple(values.shape) for name, values in draws.items() if name.startswith("pi")}
            {'pi_r2_in16': (5, 11, 1, 4), 'pi_r2_in24': (5, 2, 1, 4)}
        """
        with one_at_a_time:
            draws = list(sample_sites(self, num_samples, seed))
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    def posterior_draws(
        self, *, num_samples: int = 64, seed: int | None = 0, adapters: Sequence[str] = (), first_draw: int = 0
    ) -> PosteriorDraws:
        """Draws per adapter as numpy arrays, with A itself for the named ``adapters``, from draw ``first_draw`` on.

        Example:
            >>> draws = bayes.posterior_draws(num_samples=5)
            >>> draws.mixture_weights.shape, draws.covariance.shape  # draws, adapters, ...
            ((5, 13, 4), (5, 13, 2, 2))
        """
        with one_at_a_time:
            return draws_per_adapter(self, num_samples=num_samples, seed=seed, adapters=adapters, first_draw=first_draw)

    def prior_draws(
        self, *, num_samples: int = 64, seed: int = 0, adapters: Sequence[str] = (), first_draw: int = 0
    ) -> PosteriorDraws:
        """The same from the prior, around the means that the network has now; arguments as in
        :func:`bayeslora.inference.prior.prior_draws`.

        Example:
            >>> bayes.prior_draws(num_samples=5).noise_scale.shape  # draws, adapters
            (5, 13)
        """
        return draws_from_prior(self, num_samples=num_samples, seed=seed, adapters=adapters, first_draw=first_draw)

    def predict(
        self,
        dataset: Any,
        num_samples: int | str = 16,
        *,
        batch_size: int = 32,
        seed: int | None = 0,
        keep_draws: bool = True,
        progress: bool = True,
        first_draw: int = 0,
        prior: bool = False,
        noise_factor: float = 1.0,
        antithetic: bool = False,
        tolerance: float = 0.02,
        blocks: int | None = None,
    ) -> Prediction:
        """Posterior predictive: the mean over draws of the whole network.

        Arguments and errors are those of :func:`bayeslora.inference.predict.predict`.

        Example:
            >>> prediction = bayes.predict(dataset, num_samples=4)
            >>> prediction.probs.shape, prediction.sample_log_probs.shape  # (examples, classes), and for each draw
            ((8, 2), (4, 8, 2))
        """
        with in_turn(self.model.groups):
            return predict_examples(
                self,
                dataset,
                num_samples=num_samples,
                batch_size=batch_size,
                seed=seed,
                keep_draws=keep_draws,
                progress=progress,
                first_draw=first_draw,
                prior=prior,
                noise_factor=noise_factor,
                antithetic=antithetic,
                tolerance=tolerance,
                blocks=blocks,
            )

    def tune(
        self,
        dataset: Any,
        *,
        num_samples: int = 16,
        with_temperature: bool = False,
        batch_size: int = 32,
        seed: int = 0,
        progress: bool = True,
        antithetic: bool = False,
        agreement: float | None = None,
        blocks: int | str | None = None,
    ) -> Tuning:
        """Choose one width for all noise by held-out labels, zero included, and keep it with the posterior.

        Arguments and errors are those of :func:`bayeslora.inference.tuning.tune`.

        Example:
            >>> tuning = bayes.tune(dataset * 3, num_samples=4)  # of examples that it was not fitted to
            >>> tuning.nll <= min(tuning.nll_at_mean, tuning.nll_untuned)
            True
        """
        with in_turn(self.model.groups):
            return tune_width(
                self,
                dataset,
                num_samples=num_samples,
                with_temperature=with_temperature,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
                antithetic=antithetic,
                agreement=agreement,
                blocks=blocks,
            )

    @property
    def tuning(self) -> Tuning | None:
        """What :meth:`tune` chose, or a :class:`bayeslora.models.Tuning` of your own; with None, draws as fitted."""
        return self.model.tuning

    @tuning.setter
    def tuning(self, value: Tuning | None) -> None:
        set_tuning(self, value)

    def generate(
        self,
        prompts: Any = None,
        *,
        tokenizer: Any = None,
        num_samples: int = 8,
        mode: str = "draws",
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        stops: Sequence[str] | None = None,
        generation_config: Any = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        seed: int = 0,
        batch_size: int = 16,
        progress: bool = True,
    ) -> Generation:
        """Write on from a text, a conversation, tokens, or a list of them, with a causal language model.

        Arguments and errors are those of :func:`bayeslora.inference.generation.generate`.

        Example:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> writer = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=40))
            >>> written = BayesLoRA(writer).generate([[5, 6, 7]], num_samples=2, max_new_tokens=3)
            >>> written.num_tokens  # two draws, one text each
            array([[3, 3]])
        """
        with in_turn(self.model.groups):
            return generate_texts(
                self,
                prompts,
                tokenizer=tokenizer,
                num_samples=num_samples,
                mode=mode,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                temperature=temperature,
                top_p=top_p,
                num_beams=num_beams,
                stops=stops,
                generation_config=generation_config,
                input_ids=input_ids,
                attention_mask=attention_mask,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )

    @contextmanager
    def as_draw(self, index: int = 0, *, seed: int = 0) -> Iterator[nn.Module]:
        """Inside, ``bayes.network`` is draw ``index`` of ``seed``, one network for whatever is done with it.

        Raises:
            InputError: at the end, where the network ran and the draw did not reach one of its layers, or where it was
                taken away inside, as ``predict`` does.

        Example:
            >>> one = bayes.predict(dataset, num_samples=1, first_draw=3).probs[0]
            >>> tokens = {name: torch.tensor([dataset[0][name]]) for name in ("input_ids", "attention_mask")}
            >>> with bayes.as_draw(3) as network, torch.no_grad():
            ...     logits = network(**tokens).logits
            >>> bool(np.abs(logits.softmax(-1)[0].numpy() - one).max() < 1e-5)
            True
        """
        with running_as(self, Draws(self, 1, seed, first=index).matrices(0, 1)):
            yield self.network

    def merge(self, draw: int | None = None, *, seed: int = 0) -> nn.Module:
        """A copy of the network with the posterior mean merged into its weights: a plain transformers model.

        Args:
            draw: Merge this draw of ``seed`` instead of the mean.
            seed: As in :meth:`predict`.

        Raises:
            InputError: for a quantised network.

        Example:
            >>> type(bayes.merge()).__name__, type(bayes.merge(draw=3)).__name__
            ('BertForSequenceClassification', 'BertForSequenceClassification')
        """
        check_in_use(self.model.groups)
        return merged(self, draw, seed)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        is_main_process: bool | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: Any = None,
    ) -> None:
        """Write PEFT's two files, the posterior and a model card; see :mod:`bayeslora.storage.checkpoint`.

        The card, ``README.md``, is written anew each time until somebody edits it; from then on it stays.

        Args:
            folder: Where to: a new folder, or one that holds an adapter and nothing else, which is replaced.
            is_main_process: Whether this process writes. Trainer passes it, which keeps files of its own in the folder:
                the adapter's are then written beside them, without a card.
            state_dict: Weights as a training loop has gathered them; the module's own are written, and must be whole.
            max_shard_size: What loops pass for models; an adapter is always one file.

        Raises:
            InputError: if ``folder`` holds something else, or the weights are sharded.

        Example:
            >>> import os
            >>> bayes.save_pretrained("adapter")
            >>> sorted(os.listdir("adapter"))
            ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'bayeslora.json', 'posterior.safetensors']
        """
        checkpoint.save_from_loop(self, Path(folder), is_main_process, state_dict)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to a model hub, as transformers does with a model.

        Arguments are those of :func:`bayeslora.storage.hub.push_to_hub`.

        Example:
            >>> bayes.push_to_hub("somebody/an-adapter")  # doctest: +SKIP
        """
        return push_adapter(
            self,
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    def load_adapter(self, folder: str | Path, adapter_name: str | None = None, *, is_trainable: bool = True) -> None:
        """Read :meth:`save_pretrained`'s folder into this module, as Trainer does with a checkpoint.

        What is trained stays so, whatever ``is_trainable``, which Trainer passes.

        Raises:
            InputError: for another adapter than the one that the posterior is over, or a folder that does not fit.

        Example:
            >>> bayes.save_pretrained("adapter")
            >>> other = BayesLoRA(network, bayes.monteclora_config)
            >>> other.load_adapter("adapter")
            >>> bool(np.array_equal(other.predict(dataset).probs, bayes.predict(dataset).probs))
            True
        """
        if adapter_name not in (None, self.active_adapter):
            raise InputError(
                f"the posterior is over the adapter {self.active_adapter!r}: another is loaded by "
                f"bayes.network.load_adapter(folder, {adapter_name!r})"
            )
        checkpoint.load_adapter(self, Path(folder))

    def export_draws(
        self, folder: str | Path, num_draws: int, *, seed: int = 0, for_server: bool = False
    ) -> list[Path]:
        """Write draws, and the mean, as ordinary PEFT adapters; returns the draws' folders.

        Arguments and errors are those of :func:`bayeslora.storage.export.export_draws`.

        Example:
            >>> [folder.name for folder in bayes.export_draws("draws", 2)]
            ['draw-000', 'draw-001']
        """
        with one_at_a_time:
            return write_draws(self, folder, num_draws, seed=seed, for_server=for_server)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, network: nn.Module, *, guide: Any = None, likelihood: Any = None
    ) -> "BayesLoRA":
        """Read what :meth:`save_pretrained` wrote onto a fresh base, in evaluation mode.

        Arguments and errors are those of :func:`bayeslora.storage.opening.from_pretrained`.

        Example:
            >>> bayes.save_pretrained("adapter")
            >>> again = BayesLoRA.from_pretrained("adapter", network)
            >>> bool(np.array_equal(again.predict(dataset).probs, bayes.predict(dataset).probs))
            True
        """
        return open_pretrained(cls, folder, network, guide=guide, likelihood=likelihood)

    @classmethod
    def from_adapter(
        cls,
        network: nn.Module,
        dataset: Any,
        *,
        shape: str = "isotropic",
        width: float | str | None = None,
        agreement: float = AGREEMENT,
        with_temperature: bool = False,
        config: MonteCLoRAConfig | None = None,
        likelihood: PyroModule | None = None,
        num_samples: int = 16,
        batch_size: int = 32,
        seed: int = 0,
        progress: bool = True,
    ) -> "BayesLoRA":
        """Put a posterior on a trained LoRA adapter, without training: its mean is the adapter.

        Arguments and errors are those of :func:`bayeslora.inference.bayesianize.from_adapter`.

        Example:
            >>> _ = fit(bayes, dataset, output_dir="lora", max_steps=2, progress=False)
            >>> trained = bayes.network  # or what peft.PeftModel.from_pretrained opens
            >>> other = BayesLoRA.from_adapter(trained, dataset * 3)  # of examples that it was not trained on
            >>> other.tuning.examples, other.predict(dataset).probs.shape
            (24, (8, 2))
        """
        return posterior_of_adapter(
            cls,
            network,
            dataset,
            shape=shape,
            width=width,
            agreement=agreement,
            with_temperature=with_temperature,
            config=config,
            likelihood=likelihood,
            num_samples=num_samples,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )

    def version_info(self) -> dict[str, str]:
        """Versions of everything the numbers depend on, by package."""
        return checkpoint.version_info()

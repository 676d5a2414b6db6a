r"""The distributions that Pyro lacks: a Wishart on its Cholesky factor, the collapsed mixture, and a Dirichlet whose
draws and KL hold at any concentration.

The first two are exact restatements of the paper's posterior (section 4): the Bartlett factor *is* the Cholesky factor
of a Wishart draw, so no matrix is ever decomposed; and given :math:`(\pi, \Sigma)` the weighted sum of N Gaussians is
one Gaussian, so time and memory do not grow with N.
"""

import functools
import math
from typing import ClassVar

import torch
from pyro.distributions import Dirichlet
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, register_kl, transform_to
from torch.distributions.utils import lazy_property


class _CholeskyFactor(type(constraints.lower_cholesky)):  # type: ignore[misc]
    """Lower triangular with a positive diagonal; unlike torch's own, it has a bijection from the reals."""


cholesky_factor = _CholeskyFactor()


class VectorToCholesky(Transform):
    """The r(r+1)/2 free entries of a Cholesky factor, row by row, with the diagonal through exp."""

    domain = constraints.real_vector
    codomain = cholesky_factor
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorToCholesky)

    def _call(self, x: Tensor) -> Tensor:
        rank = math.isqrt(2 * x.shape[-1])
        rows, columns = torch.tril_indices(rank, rank, device=x.device)
        free = x.new_zeros((*x.shape[:-1], rank, rank))
        free[..., rows, columns] = x
        return free.tril(-1) + torch.diag_embed(free.diagonal(dim1=-2, dim2=-1).exp())

    def _inverse(self, y: Tensor) -> Tensor:
        free = y.tril(-1) + torch.diag_embed(y.diagonal(dim1=-2, dim2=-1).log())
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        return free[..., rows, columns]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        rank = math.isqrt(2 * shape[-1])
        return torch.Size((*shape[:-1], rank, rank))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


@biject_to.register(_CholeskyFactor)
@transform_to.register(_CholeskyFactor)
def _bijection(constraint: _CholeskyFactor) -> VectorToCholesky:
    return VectorToCholesky()


def _accurate(value: Tensor) -> Tensor:
    """In float64, where the device has it: differences of log-gamma functions leave few digits in float32."""
    return value if value.device.type == "mps" else value.double()


class MixtureWeights(Dirichlet):
    r"""Mixture weights :math:`\pi \sim \mathrm{Dir}(\alpha)`, drawn as the softmax of log-gamma variables.

    For small α a gamma variable is below every float, so :math:`\log G_k = \log G'_k + \log U_k / \alpha_k` with
    :math:`G'_k \sim \Gamma(\alpha_k + 1)` and U uniform, wherever α_k < 1. (torch's own draws in float32 have
    E[Σ_k π_k²] = 0.44 for α = 1e-4 and N = 4, where 0.9997 is exact.) As there, no weight is below the smallest
    normal number. The KL is computed in float64.

    References:
        Marsaglia and Tsang (2000), section 6.
    """

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008  (torch's own signature)
        alpha = self.concentration.expand(self._extended_shape(sample_shape))
        with torch.no_grad():
            small = (alpha < 1).to(alpha.dtype)
            log_uniform = torch.empty_like(alpha).exponential_().neg_()
        log_gamma = torch._standard_gamma(alpha + small).log().addcdiv(small * log_uniform, alpha)
        return log_gamma.softmax(-1).clamp(min=torch.finfo(alpha.dtype).tiny)


@register_kl(Dirichlet, MixtureWeights)
def _kl_mixture_weights(q: Dirichlet, p: MixtureWeights) -> Tensor:
    """KL(q‖p) in nats."""
    alpha, prior = _accurate(q.concentration), _accurate(p.concentration)
    total, prior_total = alpha.sum(-1), prior.sum(-1)
    log_constants = (
        torch.lgamma(total) - torch.lgamma(alpha).sum(-1) - torch.lgamma(prior_total) + torch.lgamma(prior).sum(-1)
    )
    mean_log = torch.digamma(alpha) - torch.digamma(total).unsqueeze(-1)
    return (log_constants + ((alpha - prior) * mean_log).sum(-1)).to(q.concentration.dtype)


class WishartCholesky(TorchDistribution):
    r"""Lower Cholesky factor :math:`L` of :math:`\Sigma = L L^\top \sim W_r(V, \nu)` with
    :math:`V = F\,\mathrm{diag}(v)\,F^\top`.

    Bartlett's decomposition: :math:`L = F\,\mathrm{diag}(\sqrt v)\,T` with :math:`T` lower triangular,
    :math:`T_{ii}^2 \sim \chi^2(\nu - i)` for :math:`i = 0..r-1` and :math:`T_{ij} \sim N(0, 1)` below the diagonal.

    Args:
        df: Degrees of freedom ν, a number of at least r.
        scale: v, positive, shape ``batch_shape + (r,)``: the diagonal of the scale matrix V where there is no F.
        factor: F, lower triangular with a positive diagonal, shape ``batch_shape + (r, r)``; the identity if None.

    References:
        Bartlett (1933); paper section 4.1, :math:`E[\Sigma] = \nu\,\mathrm{diag}(v)`.
    """

    arg_constraints: ClassVar = {"scale": constraints.independent(constraints.positive, 1)}
    support = cholesky_factor
    has_rsample = True

    def __init__(self, df: float, scale: Tensor, factor: Tensor | None = None, *, validate_args: bool | None = None):
        rank = scale.shape[-1]
        if not df >= rank:
            raise ValueError(f"WishartCholesky needs df >= r for a density; got df={df} with r={rank}")
        self.df, self.scale, self.factor = float(df), scale, factor
        super().__init__(scale.shape[:-1], torch.Size((rank, rank)), validate_args=validate_args)

    @property
    def rank(self) -> int:
        return self.event_shape[0]

    @lazy_property
    def _chi_df(self) -> Tensor:
        """ν − i for i = 0..r−1, the degrees of freedom of the squared diagonal, shape ``(r,)``."""
        return self.df - torch.arange(self.rank, dtype=self.scale.dtype, device=self.scale.device)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(WishartCholesky, _instance)
        batch_shape = torch.Size(batch_shape)
        new.df, new.scale = self.df, self.scale.expand((*batch_shape, self.rank))
        new.factor = None if self.factor is None else self.factor.expand((*batch_shape, self.rank, self.rank))
        super(WishartCholesky, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008  (torch's own signature)
        shape = self._extended_shape(sample_shape)  # sample + batch + (r, r)
        below = torch.randn(shape, dtype=self.scale.dtype, device=self.scale.device).tril(-1)
        with torch.no_grad():  # the noise has no parameters: gradients reach v through the product alone
            chi2 = 2 * torch._standard_gamma((self._chi_df / 2).expand(shape[:-1]))
            chi = chi2.clamp(min=torch.finfo(chi2.dtype).tiny).sqrt()
        return self._turned(self.scale.sqrt().unsqueeze(-1) * (below + torch.diag_embed(chi)))

    def _turned(self, lower: Tensor) -> Tensor:
        """F times what would be there without it."""
        return lower if self.factor is None else self.factor @ lower

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor of V: F diag(√v), shape ``batch_shape + (r, r)``."""
        return self._turned(torch.diag_embed(self.scale.sqrt()))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the factor itself (not of Σ), w.r.t. its r(r+1)/2 free entries; shape ``batch_shape``."""
        if self._validate_args:
            self._validate_sample(value)
        root = self.scale.sqrt()
        bartlett = value if self.factor is None else torch.linalg.solve_triangular(self.factor, value, upper=False)
        bartlett = bartlett / root.unsqueeze(-1)
        diagonal = bartlett.diagonal(dim1=-2, dim2=-1)
        half = self._chi_df / 2
        log_chi = (1 - half) * math.log(2) + (2 * half - 1) * diagonal.log() - diagonal.square() / 2
        log_chi = log_chi - torch.lgamma(half)
        below = bartlett.tril(-1).square().sum((-2, -1)) / 2
        log_normal = -below - self.rank * (self.rank - 1) / 4 * math.log(2 * math.pi)
        row = torch.arange(1, self.rank + 1, dtype=value.dtype, device=value.device)  # entries in each row of L
        if self.factor is not None:
            root = root * self.factor.diagonal(dim1=-2, dim2=-1)
        return log_chi.sum(-1) + log_normal - (row * root.log()).sum(-1)

    @property
    def mean(self) -> Tensor:
        r"""E[L], F times the diagonal :math:`\sqrt{2 v_i}\,\Gamma((\nu-i+1)/2)/\Gamma((\nu-i)/2)`."""
        return self._turned(torch.diag_embed(self._mean_diagonal))

    @property
    def _mean_diagonal(self) -> Tensor:
        log_chi = torch.lgamma((self._chi_df + 1) / 2) - torch.lgamma(self._chi_df / 2)
        return self.scale.sqrt() * math.sqrt(2) * log_chi.exp()

    @property
    def variance(self) -> Tensor:
        """Entrywise Var[L]: without F v_i below the diagonal, v_i·(ν − i) − E[L_ii]² on it, 0 above; else F∘F times it,
        as the entries are independent."""
        ones = torch.ones(self.event_shape, dtype=self.scale.dtype, device=self.scale.device)
        diagonal = self.scale * self._chi_df - self._mean_diagonal.square()
        own = self.scale.unsqueeze(-1) * ones.tril(-1) + torch.diag_embed(diagonal)
        return own if self.factor is None else self.factor.square() @ own

    @property
    def covariance_mean(self) -> Tensor:
        """E[Σ] = ν·V, shape ``batch_shape + (r, r)``."""
        inner = torch.diag_embed(self.scale)
        return self.df * (inner if self.factor is None else self.factor @ inner @ self.factor.mT)

    @property
    def expected_log_det(self) -> Tensor:
        """E[log|Σ|] = Σ_i ψ((ν−i)/2) + r·log 2 + log|V|, shape ``batch_shape``."""
        log_det = _accurate(self.scale).log().sum(-1) + _expected_log_chi_squares(self.df, self.rank)
        if self.factor is not None:
            log_det = log_det + 2 * _accurate(self.factor).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_det.to(self.scale.dtype)


@functools.cache
def _expected_log_chi_squares(df: float, rank: int) -> float:
    """E[Σ_i log χ²(ν − i)] = Σ_i ψ((ν−i)/2) + r·log 2, for i = 0..r−1."""
    half = (df - torch.arange(rank, dtype=torch.float64)) / 2
    return float(torch.digamma(half).sum()) + rank * math.log(2)


@register_kl(WishartCholesky, WishartCholesky)
def _kl_wishart(q: WishartCholesky, p: WishartCholesky) -> Tensor:
    """KL(q‖p) in nats; a one-to-one map keeps the KL, so it is that of the two Wisharts themselves."""
    if q.factor is p.factor:
        log_ratio = _accurate(q.scale).log() - _accurate(p.scale).log()
        kl = (q.df * log_ratio.expm1() - p.df * log_ratio).sum(-1) / 2
    else:
        ratio = torch.linalg.solve_triangular(_accurate(p.scale_tril), _accurate(q.scale_tril), upper=False)
        log_det = 2 * ratio.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        kl = (q.df * (ratio.square().sum((-2, -1)) - q.rank) - p.df * log_det) / 2
    if q.df != p.df:
        half_q, half_p = _accurate(q._chi_df) / 2, _accurate(p._chi_df) / 2
        kl = kl + (torch.lgamma(half_p) - torch.lgamma(half_q)).sum()
        kl = kl + (q.df - p.df) / 2 * torch.digamma(half_q).sum()
    return kl.to(q.scale.dtype)


class CollapsedMixture(TorchDistribution):
    r"""Columns :math:`A_i = \mu_i + \epsilon \sum_k w_k S_{k,i}`, :math:`S_{k,i} \sim N(0, L L^\top)`, N summed out.

    Given the weights the sum is exactly :math:`N(\mu_i, \epsilon^2 c\,L L^\top)` with :math:`c = \sum_k w_k^2`.
    The columns of one adapter share L and w.

    Args:
        loc: μ, shape ``adapters + (columns, r)``.
        factor: L, lower triangular, shape ``adapters + (r, r)``.
        weights: w, shape ``adapters + (N,)``.
        scale: ε, a positive number or one for each adapter, shape ``adapters`` (0 makes every draw equal ``loc`` and
            has no density).

    Shapes: ``batch_shape = adapters + (columns,)``, ``event_shape = (r,)``.
    """

    arg_constraints: ClassVar = {"loc": constraints.real_vector, "factor": constraints.lower_cholesky}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, factor: Tensor, weights: Tensor, scale: float | Tensor, *, validate_args: bool | None = None
    ):
        self.loc, self.factor, self.weights, self.scale = loc, factor, weights, scale
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)
        if validate_args:
            self._validate_args = True

    @property
    def num_components(self) -> int:
        """N; the paper's convention counts the columns' KL this often."""
        return self.weights.shape[-1]

    @property
    def _spread(self) -> Tensor:
        """ε·sqrt(c), shape ``adapters``."""
        return self.scale * self.weights.square().sum(-1).sqrt()

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor of one column's covariance, ε·sqrt(c)·L, shape ``adapters + (r, r)``."""
        return self._spread[..., None, None] * self.factor

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(CollapsedMixture, _instance)
        batch_shape = torch.Size(batch_shape)
        adapters = batch_shape[:-1]
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        new.factor = self.factor.expand(adapters + self.factor.shape[-2:])
        new.weights = self.weights.expand(adapters + self.weights.shape[-1:])
        new.scale = self.scale.expand(adapters) if isinstance(self.scale, Tensor) else self.scale
        super(CollapsedMixture, new).__init__(batch_shape, self.event_shape, validate_args=False)
        return new

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008  (torch's own signature)
        *outer, columns, rank = self._extended_shape(sample_shape)
        noise = torch.randn((*outer, rank, columns), dtype=self.factor.dtype, device=self.factor.device)
        return self.loc + (self.scale_tril @ noise).mT  # (..., columns, r)

    def log_prob(self, value: Tensor) -> Tensor:
        difference = (value - self.loc).mT  # (..., r, columns)
        whitened = torch.linalg.solve_triangular(self.scale_tril, difference, upper=False)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)  # adapters + (1,)
        rank = self.event_shape[0]
        return -whitened.square().sum(-2) / 2 - log_det - rank / 2 * math.log(2 * math.pi)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale_tril.square().sum(-1).unsqueeze(-2).expand(self.loc.shape)


@register_kl(CollapsedMixture, CollapsedMixture)
def _kl_collapsed(q: CollapsedMixture, p: CollapsedMixture) -> Tensor:
    """KL per column in nats; ½(tr Σ − log|Σ| − r) when p has factor I and the same μ, w and ε."""
    ratio = torch.linalg.solve_triangular(p.scale_tril, q.scale_tril, upper=False)
    shift = torch.linalg.solve_triangular(p.scale_tril, (q.loc - p.loc).mT, upper=False)
    log_det = ratio.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    kl = (ratio.square().sum((-2, -1)) - q.event_shape[0]) / 2 - log_det  # adapters
    return (kl.unsqueeze(-1) + shift.square().sum(-2) / 2).expand(q.batch_shape)


def expected_column_kl(covariance: WishartCholesky) -> Tensor:
    r"""Exact E_Σ[KL(N(0, Σ)‖N(0, FFᵀ))] of one column for Σ ~ W(F diag(v) Fᵀ, ν); no sampling noise.

    .. math:: \tfrac12\left(\nu \sum_i v_i - E[\log|F^{-1}\Sigma F^{-\top}|] - r\right)

    It does not depend on F, the identity where the covariance has no factor.

    Returns:
        Nats, shape ``covariance.batch_shape``.
    """
    scale, df, rank = _accurate(covariance.scale), covariance.df, covariance.rank
    kl = ((df * scale - scale.log()).sum(-1) - (_expected_log_chi_squares(df, rank) + rank)) / 2
    return kl.to(covariance.scale.dtype)


def expected_cooperation(weights: Dirichlet) -> Tensor:
    r"""Exact E[Σ_k π_k²] under Dir(α): :math:`\sum_k \alpha_k(\alpha_k+1) / (\alpha_0(\alpha_0+1))`.

    Returns:
        A number in [1/N, 1], shape ``weights.batch_shape``; smallest when π is always uniform.
    """
    alpha = weights.concentration
    total = alpha.sum(-1)
    return (alpha * (alpha + 1)).sum(-1) / (total * (total + 1))


def active_weights(weights: Tensor, mixture: str) -> Tensor:
    """The weights that enter the sum: all of π, or only its largest entry for ``mixture="sparse"``."""
    if mixture == "dense":
        return weights
    largest = weights == weights.amax(-1, keepdim=True)
    return weights * largest


def random_signs(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Independent ±1, each with probability ½, in float32; one random byte makes eight of them."""
    size = math.prod(shape)
    random_bytes = torch.randint(256, (-(-size // 8), 1), dtype=torch.uint8, device=device)
    bits = random_bytes.bitwise_and(2 ** torch.arange(8, dtype=torch.uint8, device=device)).ne_(0)
    return bits.flatten()[:size].view(shape).to(torch.float32).mul_(2).sub_(1)

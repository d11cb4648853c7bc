import pytest
import torch
import torch.nn.functional as F

from vqvae.quantizer import EMAQuantizer


def quantizer(codebook, **options) -> EMAQuantizer:
    """One with a given codebook [N, D], already initialised."""
    codebook = torch.tensor(codebook, dtype=torch.float32)
    made = EMAQuantizer(*codebook.shape, **options)
    made.codebook.copy_(codebook)
    made.cluster_sum.copy_(codebook)
    made.initialised.fill_(True)
    return made


@pytest.mark.parametrize("cosine", [False, True])
def test_lookup_is_brute_force(cosine):
    torch.manual_seed(0)
    made = EMAQuantizer(37, 5, cosine=cosine).eval()
    vectors = torch.randn(2, 4, 3, 5)
    found = made(vectors)
    if cosine:
        expected = F.cosine_similarity(vectors.unsqueeze(-2), made.codebook, dim=-1).argmax(dim=-1)
    else:
        expected = (vectors.unsqueeze(-2) - made.codebook).square().sum(dim=-1).argmin(dim=-1)
    assert torch.equal(found.codes, expected)
    torch.testing.assert_close(found.vectors, made.lookup(found.codes))
    target = F.normalize(vectors, dim=-1) if cosine else vectors
    torch.testing.assert_close(found.commitment, F.mse_loss(target, made.lookup(found.codes)))


def test_lookup_stays_in_float32_under_autocast():
    # 1.000 and 1.001 are one number in bfloat16
    made = quantizer([[30.0, 1.0], [30.0, 1.001]]).eval()
    vectors = torch.tensor([[30.0, 1.0], [30.0, 1.001]])
    with torch.autocast("cpu", torch.bfloat16):
        assert made(vectors).codes.tolist() == [0, 1]


def test_vectors_keep_their_dtype():
    made = quantizer([[0.0, 1.0], [1.0, 0.0]]).eval()
    assert made(torch.rand(3, 2, dtype=torch.bfloat16)).vectors.dtype == torch.bfloat16


@pytest.mark.parametrize("cosine", [False, True])
def test_gradient_goes_straight_through(cosine):
    made = quantizer([[0.0, 1.0], [1.0, 0.0]], cosine=cosine, restart_below=0.0)
    vectors = torch.tensor([[0.6, 0.8], [0.8, -0.6]], requires_grad=True)  # on the unit circle
    slope = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (made(vectors).vectors * slope).sum().backward()
    assert vectors.grad is not None
    # normalising takes out the part of a gradient along the vector itself
    along = (slope * vectors.detach()).sum(dim=-1, keepdim=True) * vectors.detach() if cosine else 0.0
    torch.testing.assert_close(vectors.grad, slope - along)


def test_commitment_pulls_vectors_to_their_codes():
    made = quantizer([[0.0, 1.0]], restart_below=0.0)
    vectors = torch.tensor([[0.5, 1.0]], requires_grad=True)
    made(vectors).commitment.backward()
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad, torch.tensor([[0.5, 0.0]]))  # 2 (x - e) / (number of elements)


def test_moving_average_is_the_formula():
    """van den Oord et al. 2017, eq. 6 to 8: N = gN + (1-g)n, m = gm + (1-g) sum z, e = m / N."""
    made = quantizer([[0.0, 0.0], [10.0, 0.0]], decay=0.75, restart_below=0.0)
    codes = made(torch.tensor([[1.0, 1.0], [3.0, -1.0], [8.0, 4.0]])).codes
    assert codes.tolist() == [0, 0, 1]
    torch.testing.assert_close(made.cluster_size, torch.tensor([0.75 + 0.25 * 2, 0.75 + 0.25 * 1]))
    torch.testing.assert_close(made.cluster_sum, torch.tensor([[0.25 * 4, 0.0], [0.75 * 10 + 0.25 * 8, 0.25 * 4]]))
    torch.testing.assert_close(made.codebook, torch.tensor([[1 / 1.25, 0.0], [9.5, 1.0]]))


def test_cosine_codes_stay_on_the_sphere():
    torch.manual_seed(0)
    made = EMAQuantizer(16, 4, cosine=True)
    for _ in range(5):
        made(torch.randn(64, 4))
    torch.testing.assert_close(made.codebook.norm(dim=-1), torch.ones(16))


def test_evaluation_and_a_lone_code_change_nothing():
    made = quantizer([[0.0, 0.0], [10.0, 0.0]]).eval()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made(torch.randn(50, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


def test_unused_codes_stay_where_they_are_without_restart():
    made = quantizer([[0.0, 0.0], [100.0, 100.0]], decay=0.9, restart_below=0.0)
    for _ in range(200):  # until the count of the second is below any floor
        made(torch.randn(20, 2))
    assert made.codebook[1].tolist() == pytest.approx([100.0, 100.0])  # m / N, both of which shrink alike


@pytest.mark.parametrize("cosine", [False, True])
def test_dead_codes_come_back(cosine):
    torch.manual_seed(0)
    # all but one code lie where no vector does
    made = quantizer([[1.0, 0.0]] + [[-1.0, 0.0]] * 7, cosine=cosine, decay=0.5, restart_below=0.3)
    angles = torch.linspace(-1.2, 1.2, 64)
    vectors = torch.stack([angles.cos(), angles.sin()], dim=-1)
    assert made(vectors).codes.unique().tolist() == [0]
    before = made.eval()(vectors).commitment
    made.train()
    for _ in range(20):
        made(vectors)
    found = made.eval()(vectors)
    assert len(found.codes.unique()) == 8
    assert found.commitment < before / 10


def test_the_first_batch_gives_the_codebook():
    torch.manual_seed(0)
    made = EMAQuantizer(8, 2)
    vectors = 50 + torch.rand(100, 2)  # far from where random codes lie
    assert not made.initialised
    found = made(vectors)
    assert made.initialised
    assert len(found.codes.unique()) > 4
    assert float(found.commitment) < 0.1


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_the_codes(broken):
    made = quantizer([[0.0, 0.0], [10.0, 0.0]])
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    vectors = torch.randn(8, 2)
    vectors[3, 1] = broken
    found = made(vectors)
    assert not found.commitment.isfinite()  # so that the training loop sees it
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())

"""The program of content and pose: geometry, bound and promises; and that a turned image has the same content."""

import math
import re
from functools import partial

import anndata
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from anndata import AnnData

import scvae
from scvae.boundary.process import unchecked
from scvae.data.cells import Schema
from scvae.distributions import WrappedNormal
from scvae.inference import evidence
from scvae.inference.evidence import elbo_terms, importance_weighted
from scvae.modules.pixels import Pixels
from scvae.modules.poses import CoordinateDecoder, MapDecoder, grid, look_up, to_object, turned
from scvae.modules.posteriors import POSTERIORS
from scvae.modules.priors import PRIORS

COMBINATIONS = [
    (posterior, prior)
    for posterior in POSTERIORS
    for prior in PRIORS
    if not (prior == "vamp" and posterior.startswith("iaf"))
]


@pytest.fixture(scope="module")
def letters():
    """120 images of an L, a T or a dash, 12 x 12, turned by any angle and shifted a little; two batches."""
    rng = np.random.default_rng(0)
    shapes = np.zeros((3, 12, 12), dtype=np.float32)
    shapes[0, 2:10, 4:6] = shapes[0, 8:10, 4:9] = 1
    shapes[1, 2:10, 5:7] = shapes[1, 2:4, 2:10] = 1
    shapes[2, 5:7, 2:10] = 1
    kind = rng.integers(3, size=120)
    angle, shift = rng.uniform(-np.pi, np.pi, 120), rng.normal(0, 0.5, (120, 2))
    pose = to_object(torch.tensor(angle).float(), torch.tensor(shift / 6).float())
    places = torch.cat([grid(12, 12), torch.ones(144, 1)], 1) @ pose
    images = look_up(torch.tensor(shapes[kind]).unsqueeze(1), places).view(120, 12, 12).numpy()
    adata = AnnData(shape=(120, 0), obsm={"image": images.clip(0, 1)})
    adata.obs["batch"] = np.where(rng.random(120) < 0.5, "a", "b")
    adata.obs["kind"] = [("L", "T", "dash")[k] for k in kind]
    return adata


@pytest.fixture
def images(letters):
    return letters.copy()


@pytest.fixture(scope="module")
def fit_images():
    def fit(adata, **options):
        options = {"n_latent": 3, "n_hidden": 8, "n_rotations": 4, "max_epochs": 2, "learning_rate": 0.01, **options}
        return scvae.fit(adata, "pose", image_key="image", progress=False, **{"batch_size": 32, **options})

    return fit


# ---- A normal on the circle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.05, 0.5, 0.7, 1.5, 3.0, 8.0])
def test_a_wrapped_normal_is_a_sum_of_normals(scale):
    d = WrappedNormal(torch.tensor(2.5, dtype=torch.double), torch.tensor(scale, dtype=torch.double))
    at = np.linspace(-np.pi, np.pi, 4001)[:-1]
    turns = 2 * np.pi * np.arange(-40, 41)
    density = scipy.stats.norm(2.5, scale).pdf(at[:, None] + turns).sum(1)
    log_prob = d.log_prob(torch.tensor(at)).numpy()
    assert np.allclose(np.exp(log_prob), density, atol=1e-7)
    entropy = -(density * np.log(np.maximum(density, 1e-300))).mean() * 2 * np.pi
    assert d.entropy().item() == pytest.approx(entropy, abs=1e-6)


def test_draws_of_a_wrapped_normal_lie_on_the_circle_and_have_its_moments():
    torch.manual_seed(0)
    loc, scale = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 1.2])
    draws = WrappedNormal(loc, scale).sample((200_000,)).numpy()
    assert draws.min() >= -np.pi
    assert draws.max() < np.pi
    moment = np.exp(1j * draws).mean(0)
    assert np.allclose(moment, np.exp(1j * loc.numpy() - scale.numpy() ** 2 / 2), atol=0.01)


def test_the_divergence_from_the_uniform_angle_is_finite_and_right():
    def divergence(scale):
        return math.log(2 * math.pi) - WrappedNormal(torch.tensor(0.0), torch.tensor(scale)).entropy().item()

    assert divergence(20.0) == pytest.approx(0, abs=1e-6)
    assert divergence(0.01) == pytest.approx(math.log(2 * math.pi) - math.log(0.01 * math.sqrt(2 * math.pi * math.e)))
    torch.manual_seed(0)
    d = WrappedNormal(torch.tensor(1.0), torch.tensor(0.9))
    by_draws = (d.log_prob(d.sample((400_000,))) + math.log(2 * math.pi)).mean().item()
    assert divergence(0.9) == pytest.approx(by_draws, abs=0.01)


def test_angles_can_be_differentiated():
    loc, scale = (torch.tensor(x, requires_grad=True) for x in (3.1, 0.5))
    WrappedNormal(loc, scale).rsample().backward()
    assert loc.grad == 1
    assert scale.grad != 0


# ---- Geometry ------------------------------------------------------------------------------------------------


def test_coordinates_are_those_of_the_centres_of_pixels_and_keep_the_aspect():
    points = grid(4, 8).view(4, 8, 2)
    assert points[0, 0].tolist() == [-0.875, -0.375]
    assert points[3, 7].tolist() == [0.875, 0.375]
    assert torch.allclose(points.mean((0, 1)), torch.zeros(2))


def test_the_map_to_an_object_undoes_its_pose():
    theta, delta = torch.tensor([0.3, -2.0]), torch.tensor([[0.1, 0.2], [-0.3, 0.0]])
    of_object = torch.randn(5, 2)
    in_image = turned(of_object, theta.view(2, 1)) + delta.unsqueeze(1)
    back = torch.cat([in_image, torch.ones(2, 5, 1)], -1) @ to_object(theta, delta)
    assert torch.allclose(back, of_object.expand(2, -1, -1), atol=1e-6)
    assert to_object(None, None) is None
    assert torch.allclose(to_object(None, delta)[:, :2], torch.eye(2).expand(2, -1, -1))


@pytest.mark.parametrize("kind", ["map", "coordinates"])
def test_decoders_render_turned_and_shifted_objects(kind):
    torch.manual_seed(0)
    shape, none = (2, 8, 8), torch.zeros(3, 0)
    decoder = MapDecoder(2, 0, shape, 3, 16, 1, None) if kind == "map" else CoordinateDecoder(2, 0, shape, 16, 2, None)
    decoder.eval()
    if kind == "map":
        torch.nn.init.normal_(decoder.out.main.weight)
    z, points = torch.randn(3, 2), grid(8, 8)
    upright = decoder(z, none, points, None).view(3, *shape)
    quarter = torch.full((3,), math.pi / 2)
    by_turn = decoder(z, none, points, to_object(quarter, torch.zeros(3, 2))).view(3, *shape)
    assert torch.allclose(by_turn, torch.rot90(upright, -1, (2, 3)), atol=1e-4)
    one_right = torch.tensor([0.25, 0.0]).expand(3, -1)  # a pixel
    by_shift = decoder(z, none, points, to_object(None, one_right)).view(3, *shape)
    assert torch.allclose(by_shift[..., 1:], upright[..., :-1], atol=1e-4)
    several = to_object(torch.tensor([[0.0], [1.0]]).expand(2, 3), torch.randn(2, 3, 2))
    assert torch.allclose(
        decoder(z, none, points, several), torch.stack([decoder(z, none, points, pose) for pose in several]), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["map", "coordinates"])
def test_an_object_is_turned_about_its_centre_of_mass_and_shifted_to_where_that_lies(kind):
    torch.manual_seed(0)
    shape, none = (2, 9, 9), torch.zeros(3, 0)
    pixels = Pixels("gaussian", Schema(genes=(), image_shape=shape))
    make = partial(MapDecoder, 2, 0, shape, 0) if kind == "map" else partial(CoordinateDecoder, 2, 0, shape)
    decoder, free = make(16, 2, pixels.mass).eval(), make(16, 2, None).eval()
    if kind == "map":
        torch.nn.init.normal_(decoder.out.main.weight)
    free.load_state_dict(decoder.state_dict())
    z, points = torch.randn(3, 2), grid(20, 20)
    a = free(z, none, grid(9, 9), None).view(3, *shape).detach().numpy()
    edge = np.concatenate([a[..., 0, :], a[..., -1, :], a[..., 0], a[..., -1]], -1).mean(-1)
    contrast = np.abs(a - edge[..., None, None])
    mass = (contrast**2 / (contrast + 0.3 * contrast.max((1, 2, 3), keepdims=True))).sum(1)
    centre = np.array([scipy.ndimage.center_of_mass(part)[::-1] for part in mass])  # of columns, of rows
    pose = to_object(torch.tensor([0.3, -2.0, 1.0]), torch.randn(3, 2) / 10)
    by_hand = pose.clone()
    by_hand[:, 2] += torch.tensor((centre - 4) / 4.5).float()
    assert np.abs(centre - 4).max() > 0.1
    assert torch.allclose(decoder(z, none, points, pose), free(z, none, points, by_hand), atol=1e-4)


def test_dark_objects_weigh_as_much_as_bright_ones_and_an_empty_image_has_no_centre():
    pixels = Pixels("bernoulli", Schema(genes=(), image_shape=(9, 9)))
    a = torch.randn(4, 1, 9, 9)
    assert torch.allclose(pixels.mass(a), pixels.mass(-a), atol=1e-6)
    decoder = MapDecoder(2, 0, (1, 9, 9), 0, 16, 1, pixels.mass)
    decoder.start(torch.zeros(1, 81))
    torch.nn.init.zeros_(decoder.out.main.weight)
    a = decoder(torch.randn(5, 2), torch.zeros(5, 0), grid(9, 9), None)
    a.sum().backward()
    assert torch.equal(a, torch.zeros(5, 1, 81))
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters())


# ---- The bound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle_scale", [None, 0.8])
def test_the_bound_is_the_evidence_summed_over_the_copies(images, fit_images, angle_scale):
    """For fixed draws, ELBO = log sum_k exp(log weight of copy k), but for divergences in closed form."""
    model = fit_images(images, angle_scale=angle_scale)
    batch = model._cells(images).batch(torch.arange(40))
    with torch.no_grad(), unchecked():
        torch.manual_seed(0)
        log_likelihood, kl = elbo_terms(model.program, batch)
        torch.manual_seed(0)
        q, p = evidence._traces(model.program, batch)
        assert q.nodes["k"]["value"].shape == (4, 1)
        terms = sum(-evidence.kl_divergence(q.nodes[n]["fn"], p.nodes[n]["fn"]) for n in ("z", "Delta"))
        theta = q.nodes["theta"]["fn"]
        terms = (
            terms
            + theta.entropy()
            + p.nodes["theta"]["fn"]
            .log_prob(q.nodes["theta"]["value"])
            .where(torch.tensor(angle_scale is None), torch.tensor(0.0))
        )
        if angle_scale is not None:
            terms = terms - theta.entropy() - evidence.kl_divergence(theta, p.nodes["theta"]["fn"])
        terms = (
            terms + p.nodes["x"]["log_prob"]
            if "log_prob" in p.nodes["x"]
            else terms + p.nodes["x"]["fn"].log_prob(batch.values)
        )
        terms = terms + p.nodes["k"]["fn"].log_prob(q.nodes["k"]["value"])
    total = sum(log_likelihood.values()) - sum(kl.values())
    assert torch.allclose(total, terms.logsumexp(0), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"angle_scale": 0.5}, {"encoder": "plain"}, {"translate": False}])
def test_the_bound_tightens(images, fit_images, options):
    model = fit_images(images, max_epochs=20, **options)
    batch = model._cells(images).batch(torch.arange(len(images)))
    torch.manual_seed(0)
    with torch.no_grad(), unchecked():
        bounds = [evidence.elbo(model.program, batch, 20)]
        bounds += [importance_weighted(model.program, batch, n) for n in (4, 32, 256)]
    means = [bound.mean().item() for bound in bounds]
    assert means == sorted(means)


@pytest.mark.parametrize(("angle_scale", "spread"), [(None, 2 * np.pi), (2.0, 2 * np.pi), (0.1, 0.8)])
def test_the_copies_lie_where_the_prior_of_the_angle_has_its_mass(images, fit_images, angle_scale, spread):
    model = fit_images(images, angle_scale=angle_scale, n_rotations=5, max_epochs=1)
    expected = spread * np.array([-0.4, -0.2, 0.0, 0.2, 0.4])
    assert np.allclose(model.program.angles.numpy(), expected, atol=1e-6)
    assert images.obs["scvae_angle"].abs().max() <= spread * 0.6  # each copy answers for a fifth to either side


# ---- What it promises ----------------------------------------------------------------------------------------


def test_a_quarter_turn_changes_the_angle_and_nothing_of_the_content(images, fit_images):
    model = fit_images(images, max_epochs=5)
    other = images.copy()
    other.obsm["image"] = np.rot90(images.obsm["image"], -1, (1, 2)).copy()
    assert np.allclose(model.embed(images), model.embed(other), atol=1e-4)
    poses = []
    for adata in (images, other):
        model._write(adata, model._cells(adata))
        poses.append(adata.obs["scvae_angle"].to_numpy())
    difference = np.exp(1j * (poses[1] - poses[0] - np.pi / 2))
    assert np.quantile(np.abs(difference - 1), 0.95) < 1e-3  # ties between copies may be broken otherwise


def test_content_is_set_apart_from_angle_and_shift(images, fit_images):
    """After a short training, the letters are told apart by content whatever their pose, and the angle is right."""
    model = fit_images(images, n_hidden=64, n_rotations=8, n_latent=2, max_epochs=150, learning_rate=3e-3)
    labels = images.obs["kind"].to_numpy()
    z = images.obsm["X_scvae"]
    distance = ((z[:, None] - z) ** 2).sum(-1) + np.diag(np.full(len(z), np.inf))
    assert (labels[distance.argmin(1)] == labels).mean() > 0.9
    half = len(images) // 2
    turned_back = model.reconstruct(images[:half], pose=(0.0, 0.0, 0.0))
    by_kind = {k: turned_back[labels[:half] == k] for k in ("L", "T")}
    within = np.mean([((x - x.mean(0)) ** 2).mean() for x in by_kind.values()])
    images_of = images.obsm["image"][:half]
    raw = np.mean([images_of[labels[:half] == k].var(0).mean() for k in ("L", "T")])
    assert within < raw / 2


@pytest.mark.slow
@pytest.mark.parametrize(("posterior", "prior"), COMBINATIONS)
def test_every_posterior_and_prior(images, fit_images, tmp_path, posterior, prior):
    options = {"batch_key": "batch", "posterior": posterior, "prior": prior}
    if prior != "normal":
        options["n_components"] = 4
    start = fit_images(images, max_epochs=1, learning_rate=1e-12, **options)
    model = fit_images(images, max_epochs=15, **options)
    elbo = model.elbo(images, n_samples=4)
    assert elbo.mean() > start.elbo(images, n_samples=4).mean() + 1
    assert model.log_likelihood(images, n_samples=16).mean() > elbo.mean() - 1e-3

    assert images.obsm["X_scvae"].shape == images.obsm["X_scvae_std"].shape == (120, 3)
    assert images.obs["scvae_angle"].between(-np.pi, np.pi).all()
    assert (images.obs["scvae_angle_std"] > 0).all()
    assert images.obsm["X_scvae_shift"].shape == images.obsm["X_scvae_shift_std"].shape == (120, 2)
    assert ("scvae_cluster" in images.obs) == (prior == "mixture")

    model.save(tmp_path / "model")
    loaded = scvae.load(tmp_path / "model")
    assert np.array_equal(loaded.embed(images), model.embed(images))
    assert np.array_equal(loaded.elbo(images), model.elbo(images))

    new = loaded.generate(20, batch="b", seed=1)
    assert new.obsm["image"].shape == (20, 12, 12)
    assert set(np.unique(new.obsm["image"])) <= {0, 1}
    assert np.isfinite(loaded.elbo(new)).all()

    for n_samples in (None, 3):
        denoised = loaded.denoise(images, n_samples=n_samples)
        assert denoised.shape == (120, 144)
        assert ((denoised >= 0) & (denoised <= 1)).all()
    assert not np.allclose(loaded.reconstruct(images, batch="a"), loaded.reconstruct(images, batch="b"))

    images.write_h5ad(tmp_path / "images.h5ad")
    read = anndata.read_h5ad(tmp_path / "images.h5ad")
    for key in images.obsm:
        assert np.array_equal(read.obsm[key], images.obsm[key])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"rotate": False},
        {"translate": False},
        {"rotate": False, "translate": False},
        {"encoder": "plain"},
        {"decoder": "coordinates"},
        {"decoder": "coordinates", "encoder": "plain", "angle_scale": 0.5},
        {"encode_covariates": False, "batch_key": "batch"},
    ],
)
def test_every_variant_fits_and_improves(images, fit_images, options):
    start = fit_images(images, max_epochs=1, learning_rate=1e-12, **options)
    model = fit_images(images, max_epochs=15, **options)
    assert model.elbo(images, n_samples=4).mean() > start.elbo(images, n_samples=4).mean() + 1
    assert ("scvae_angle" in images.obs) == options.get("rotate", True)
    assert ("X_scvae_shift" in images.obsm) == options.get("translate", True)
    assert model.reconstruct(images).shape == (120, 1, 12, 12)
    assert np.array_equal(model.embed(images), fit_images(images, max_epochs=15, **options).embed(images))


@pytest.mark.parametrize("pixels", ["bernoulli", "gaussian", "poisson", "nb"])
def test_every_likelihood_of_pixels_and_several_channels(images, fit_images, pixels):
    rng = np.random.default_rng(0)
    image = np.stack([images.obsm["image"], images.obsm["image"][:, ::-1]], 1)[:, :, 1:-1]  # [n, 2, 10, 12]
    images.obsm["image"] = {
        "bernoulli": image,
        "gaussian": 100 + 10 * (image + rng.normal(0, 0.1, image.shape)),
        "poisson": rng.poisson(5 * image),
        "nb": rng.poisson(rng.gamma(2, 2, image.shape) * image),
    }[pixels]
    start = fit_images(images, pixels=pixels, max_epochs=1, learning_rate=1e-12)
    model = fit_images(images, pixels=pixels, max_epochs=30)
    assert model.elbo(images, n_samples=4).mean() > start.elbo(images, n_samples=4).mean() + 1
    reconstructed = model.reconstruct(images)
    assert reconstructed.shape == (120, 2, 10, 12)
    assert np.corrcoef(reconstructed.ravel(), images.obsm["image"].ravel())[0, 1] > 0.3
    new = model.generate(10)
    assert new.obsm["image"].shape == (10, 2, 10, 12)
    assert (new.obsm["image"] == np.rint(new.obsm["image"])).all() == (pixels != "gaussian")


def test_a_cell_is_rendered_in_any_pose_and_size(images, fit_images):
    model = fit_images(images, max_epochs=10)
    own = model.reconstruct(images)
    assert own.shape == (120, 1, 12, 12)
    assert model.reconstruct(images, size=(36, 24)).shape == (120, 1, 36, 24)
    fine = model.reconstruct(images, size=(36, 36))  # every third pixel of which has the same centre
    assert np.allclose(fine[:, :, 1::3, 1::3], own, atol=1e-5)
    upright = model.reconstruct(images, pose=(0.0, 0.0, 0.0))
    quarter = model.reconstruct(images, pose=(np.pi / 2, 0.0, 0.0))
    assert np.allclose(quarter, np.rot90(upright, -1, (2, 3)), atol=1e-4)
    down = model.reconstruct(images, pose=(0.0, 0.0, 1.0))
    assert np.allclose(down[:, :, 1:], upright[:, :, :-1], atol=1e-4)
    assert np.allclose(model.decode(model.embed(images)), upright, atol=1e-5)


# ---- Bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.obsm.pop("image"), KeyError, "adata.obsm has no 'image'; it has none"),
        (lambda a: a.obsm.update(image=np.zeros((120, 5))), ValueError, r"of shape \(120, 5\): images are wanted"),
        (lambda a: a.obsm["image"].__setitem__((3, 0, 1), np.nan), ValueError, "NaN .* in cell '3', pixel 'image_1'"),
        (lambda a: a.obsm["image"].__imul__(255), ValueError, "outside 0 to 1, .* Divide the images by their largest"),
    ],
)
def test_images_that_cannot_be_modelled_are_named(images, fit_images, unchanged, change, error, message):
    change(images)
    with unchanged(images), pytest.raises(error) as caught:
        fit_images(images)
    assert re.search(message, str(caught.value.args[0])), caught.value.args[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": "binary"}, "pixels is one of 'bernoulli', 'gaussian', 'poisson', 'nb', not 'binary'"),
        ({"encoder": "deep"}, "encoder is one of 'rotations', 'plain', not 'deep'"),
        ({"decoder": "deep"}, "decoder is one of 'map', 'coordinates', not 'deep'"),
        ({"angle_scale": 0.0}, "angle_scale is a number above 0, or None, not 0.0"),
        ({"shift_scale": math.inf}, "shift_scale is a number above 0, not inf"),
        ({"n_rotations": 1}, "n_rotations is a whole number of at least 2"),
        ({"use_rep": "image"}, "image_key takes the place of layer, use_rep and mask_var"),
        ({"size_factor_key": "size"}, "size_factor_key belongs to models of counts; 'pose' models images"),
    ],
)
def test_options_that_make_no_sense_are_refused(images, fit_images, unchanged, options, message):
    with unchanged(images), pytest.raises(ValueError, match=message):
        fit_images(images, **options)


def test_images_go_with_programs_of_images_only(images, adata):
    with pytest.raises(ValueError, match="'pose' models images: name the key of adata.obsm that holds them"):
        scvae.fit(images, "pose", progress=False)
    adata.obsm["image"] = np.zeros((80, 4, 4))
    with pytest.raises(ValueError, match="image_key belongs to models of images; 'zinb' models the values of genes"):
        scvae.fit(adata, image_key="image", progress=False)


def test_what_a_model_of_images_cannot_answer(images, model, adata, fit_images):
    of_images = fit_images(images)
    with pytest.raises(ValueError, match="reconstruct belongs to models of images; ask 'zinb' to denoise"):
        model.reconstruct(adata)
    with pytest.raises(ValueError, match="layer_added is for genes; the model reads adata.obsm\\['image'\\]"):
        of_images.denoise(images, layer_added="x")
    with pytest.raises(ValueError, match="library_size belongs to models of counts; 'pose' models images"):
        of_images.denoise(images, library_size=10)
    with pytest.raises(ValueError, match="pose is 'own', or an angle and two shifts, not 'upright'"):
        of_images.reconstruct(images, pose="upright")
    with pytest.raises(ValueError, match="pose is an angle and two shifts, three numbers"):
        of_images.reconstruct(images, pose=(0.0, 1.0))
    other = images.copy()
    other.obsm["image"] = images.obsm["image"][:, :6]
    with pytest.raises(ValueError, match=r"images of shape \(6, 12\); the model was fitted to \(12, 12\)"):
        of_images.embed(other)

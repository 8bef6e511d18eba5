"""What a support image tells the transformer: features of the image itself, and of what a layer receives of it."""

from mini_ht.arrays import Array, Parameters, as_floats, fused, namespace, relu
from mini_ht.config import Config
from mini_ht.kernels import NORM_EPS, conv2d, conv_max_pool
from mini_ht.plan import Layer, LocalConv

SHARED_STRIDES = (2, 2, 2, 1)

# Normed features would drown the class encodings, by which tokens of a class start to find each other.
POOLED_SCALE = 0.3


def shared_widths(config: Config) -> tuple[int, ...]:
    """Output channels of each conv behind the shared features; none when the config asks for no such features."""
    width = config.shared_features
    if not width:
        return ()
    return (max(1, width // 4), max(1, width // 2), width, width) if config.taper else (width,) * len(SHARED_STRIDES)


def shared_features(parameters: Parameters, config: Config, support: Array) -> Array:
    """The image embedding s: four 3x3 convs 'same', then the mean over space.

    Each conv is strided, then ReLU (released code); or has ReLU, a pool, blurred or not, and a norm over the map.
    support [E, n, H, W, C] -> [E, n, shared features] (width 0 when the config asks for none).
    """
    episodes, images = support.shape[:2]
    if not config.shared_features:
        return support.reshape(episodes, images, -1)[..., :0]
    x = support.reshape(episodes * images, *support.shape[2:])  # [E * n, H, W, C]
    for number, stride in enumerate(SHARED_STRIDES):
        weight, bias = (parameters[f"shared.conv{number}.{part}"] for part in ("weight", "bias"))
        if config.shared_convs == "strided":
            x = relu(conv2d(x, weight, bias, stride, padding=1))
        else:
            x = normed(relu(conv_max_pool(x, weight, bias, blur=config.shared_convs == "blurred")))
    means = as_floats(x.mean((1, 2)), weight).reshape(episodes, images, -1)
    return means if config.shared_convs == "strided" else POOLED_SCALE * means


def normed(x: Array) -> Array:
    """Each image's map to mean 0 and variance 1: [B, h, w, C]."""
    flat = x.reshape(len(x), -1)  # [B, h * w * C]
    if torch_functions := fused(flat):
        return torch_functions.layer_norm(flat, flat.shape[1:], eps=NORM_EPS).reshape(x.shape)
    centred = flat - flat.mean(1, keepdims=True)
    return (centred * ((centred * centred).mean(1, keepdims=True) + NORM_EPS) ** -0.5).reshape(x.shape)


def local_features(parameters: Parameters, layer: Layer, activations: Array) -> Array:
    """The activation embedding h of one layer: each conv's output before its ReLU, averaged over space.

    activations [E, n, h, w, Cin] -> [E, n, sum of the convs' widths] (width 0 without local convs).
    """
    episodes, images = activations.shape[:2]
    x = activations.reshape(episodes * images, *activations.shape[2:])  # [E * n, h, w, Cin]
    means = [as_floats(x.reshape(len(x), -1)[:, :0], parameters["logits.xi"])]
    for number, conv in enumerate(layer.local):
        weight, bias = (parameters[f"{layer.name}.local{number}.{part}"] for part in ("weight", "bias"))
        if number:
            x = relu(x)
        if conv is layer.local[-1]:  # nobody sees its map, and the mean of a conv is the conv of a mean
            seen = as_floats(mean_neighbourhood(x, conv), weight).reshape(episodes, images, -1)  # [E, n, k * k * Cin]
            # A product for each episode, there each image: with one for all, some BLAS round by how many there are.
            means.append((seen @ weight.reshape(-1, conv.outputs) + bias).reshape(len(x), -1))  # [E * n, width]
        else:
            x = conv2d(x, weight, bias, conv.stride)
            means.append(as_floats(x.mean((1, 2)), weight))  # [E * n, width]
    return namespace(x).concat(means, axis=-1).reshape(episodes, images, -1)


def mean_neighbourhood(x: Array, conv: LocalConv) -> Array:
    """The mean of all neighbourhoods that a conv sees (row, column, channel): [B, h, h, Cin] -> [B, k * k * Cin]."""
    xp, reach = namespace(x), x.shape[1] - conv.kernel
    apart = xp.arange(x.shape[1], device=x.device) - xp.arange(conv.kernel, device=x.device)[:, None]  # [k, h]
    seen = as_floats((apart >= 0) & (apart <= reach) & (apart % conv.stride == 0), x)  # [k, h], 0 and 1
    places = xp.broadcast_to(xp.kron(seen, seen), (len(x), conv.kernel**2, x.shape[1] ** 2))  # [B, k * k, h * h]
    means = places @ x.reshape(len(x), -1, x.shape[-1]) / (reach // conv.stride + 1) ** 2  # [B, k * k, Cin]
    return means.reshape(len(x), -1)

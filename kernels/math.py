"""Device functions for the mathematics that the kernels share, in float32.

Triton has no tanh or atan that every target and the interpreter know. The polynomials are Chebyshev fits of
(f(x) - x) / x^3 in x^2, good to 1 ulp of float32 over their range. Comparisons are arranged so that NaN stays NaN.
"""

import triton
import triton.language as tl

# The forms of the soft clamp by number, as fastmsflow.reference.clamp_forms registers them.
TANH, SCALED_TANH, ATAN = (tl.constexpr(i) for i in range(3))

# FrEIA's rounding of 2 / pi; trained weights depend on it.
ATAN_GAIN = tl.constexpr(0.636)
HALF_PI = tl.constexpr(1.5707963267948966)
TAN_PI_8 = tl.constexpr(0.41421356237309503)
TAN_3PI_8 = tl.constexpr(2.414213562373095)


@triton.jit
def tanh(x):
    """tanh(x) to 1 ulp of float32; Chebyshev near 0, exp elsewhere."""
    z = x * x
    p = ((((-0.00627639 * z + 0.02111622) * z - 0.05387514) * z + 0.13332924) * z - 0.3333333) * z * x + x
    # 1 - 2 / (exp(2|x|) + 1) would cancel where x is small.
    q = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, p, tl.where(x < 0, -q, q))


@triton.jit
def atan(x):
    """atan(x) to 1 ulp of float32."""
    a = tl.abs(x)
    # atan(a) = pi/2 - atan(1/a) = pi/4 + atan((a - 1) / (a + 1)): the argument stays within +-tan(pi/8).
    steep = a > TAN_3PI_8
    middle = a > TAN_PI_8
    numerator = tl.where(steep, -1.0, tl.where(middle, a - 1.0, a))
    denominator = tl.where(steep, a, tl.where(middle, a + 1.0, 1.0))
    base = tl.where(steep, HALF_PI, tl.where(middle, HALF_PI / 2, 0.0))
    y = numerator / denominator
    z = y * y
    y = ((((-0.06459381 * z + 0.107463) * z - 0.14264233) * z + 0.1999955) * z - 0.33333332) * z * y + y + base
    return tl.where(x < 0, -y, y)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return tl.where(x > 0, x, 0.0 * x) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def global_gain(global_scale):
    """g = 0.1 softplus(global_scale, beta = 0.5)."""
    return 0.2 * softplus(0.5 * global_scale)


@triton.jit
def soft_clamp(raw, clamp, FORM: tl.constexpr):
    """Returns the bounded log-scale and its derivative by ``raw``; a form that is none does not compile."""
    if FORM == TANH:
        th = tanh(raw)
        return clamp * th, clamp * (1.0 - th * th)
    elif FORM == SCALED_TANH:  # noqa: RET505 - Triton compiles statements behind a return, but not other branches
        th = tanh(raw / clamp)
        return clamp * th, 1.0 - th * th
    else:
        tl.static_assert(FORM == ATAN, "unknown form of the soft clamp")
        ratio = raw / clamp
        return atan(ratio) * clamp * ATAN_GAIN, 1.0 / (1.0 + ratio * ratio) * ATAN_GAIN

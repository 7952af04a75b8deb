"""Functions of TensorFlow that a model file may name: they compute tensors from tensors, and nothing else.

None reads or writes a file, talks to another machine, prints, keeps state, or calls a function of Python that it is
given.
"""
# ruff: noqa: SIM905 - a list of quoted words would be three times as long

_TENSORS = """
    argsort batch_to_space bitcast boolean_mask broadcast_to cast clip_by_norm clip_by_value concat
    convert_to_tensor cumsum einsum ensure_shape expand_dims eye fill gather gather_nd identity identity_n matmul
    meshgrid one_hot ones ones_like pad rank repeat reshape reverse reverse_sequence roll saturate_cast scatter_nd
    searchsorted sequence_mask shape shape_n size slice sort space_to_batch space_to_batch_nd split squeeze stack
    stop_gradient strided_slice tensor_scatter_nd_add tensor_scatter_nd_max tensor_scatter_nd_min
    tensor_scatter_nd_sub tensor_scatter_nd_update tensordot tile transpose truncatediv truncatemod unstack where
    zeros zeros_like
""".split()
_OPERATORS = ("__operators__.add", "__operators__.eq", "__operators__.getitem", "__operators__.ne")
_MATH = """
    abs accumulate_n acos acosh add add_n angle argmax argmin asin asinh atan atan2 atanh bessel_i0 bessel_i0e
    bessel_i1 bessel_i1e betainc ceil conj cos cosh count_nonzero cumprod cumsum cumulative_logsumexp digamma divide
    divide_no_nan equal erf erfc erfcinv erfinv exp expm1 floor floordiv floormod greater greater_equal igamma
    igammac imag invert_permutation is_finite is_inf is_nan is_non_decreasing is_strictly_increasing l2_normalize
    less less_equal lgamma log log1p log_sigmoid log_softmax logical_and logical_not logical_or logical_xor maximum
    minimum mod multiply multiply_no_nan ndtri negative nextafter not_equal polygamma polyval pow real reciprocal
    reciprocal_no_nan reduce_all reduce_any reduce_euclidean_norm reduce_logsumexp reduce_max reduce_mean reduce_min
    reduce_prod reduce_std reduce_sum reduce_variance rint round rsqrt scalar_mul segment_max segment_mean
    segment_min segment_prod segment_sum sigmoid sign sin sinh softmax softplus softsign sqrt square
    squared_difference subtract tan tanh top_k truediv unsorted_segment_max unsorted_segment_mean
    unsorted_segment_min unsorted_segment_prod unsorted_segment_sum xdivy xlog1py xlogy zero_fraction
""".split()
_NETWORKS = """
    atrous_conv2d avg_pool avg_pool1d avg_pool2d avg_pool3d batch_normalization bias_add conv1d conv1d_transpose
    conv2d conv2d_transpose conv3d conv3d_transpose conv_transpose convolution crelu depth_to_space depthwise_conv2d
    depthwise_conv2d_native dilation2d dropout elu embedding_lookup erosion2d experimental.stateless_dropout
    fused_batch_norm gelu l2_loss l2_normalize leaky_relu local_response_normalization log_softmax lrn max_pool
    max_pool1d max_pool2d max_pool3d max_pool_with_argmax moments pool relu relu6 selu separable_conv2d sigmoid silu
    softmax softplus softsign space_to_batch space_to_depth swish tanh top_k weighted_moments zero_fraction
""".split()
_LINEAR_ALGEBRA = """
    adjoint band_part cross det diag diag_part einsum eye global_norm inv l2_normalize matmul matrix_transpose
    matvec norm normalize set_diag tensor_diag tensor_diag_part tensordot trace
""".split()
_IMAGES = """
    adjust_brightness adjust_contrast adjust_gamma adjust_hue adjust_saturation central_crop convert_image_dtype
    crop_and_resize crop_to_bounding_box extract_patches flip_left_right flip_up_down grayscale_to_rgb hsv_to_rgb
    image_gradients pad_to_bounding_box per_image_standardization resize resize_area resize_bicubic resize_bilinear
    resize_images resize_nearest_neighbor resize_with_crop_or_pad resize_with_pad rgb_to_grayscale rgb_to_hsv
    rgb_to_yiq rgb_to_yuv rot90 sobel_edges total_variation transpose yiq_to_rgb yuv_to_rgb
""".split()
_QUANTIZATION = (
    *("fake_quant_with_min_max_args", "fake_quant_with_min_max_vars", "fake_quant_with_min_max_vars_per_channel"),
    *("quantize_and_dequantize_v2",),
)
# Names that only version 1 of the interface has, which Keras 2 writes for many operators.
_VERSION_1 = ("batch_to_space_nd", "depth_to_space", "div", "floor_div", "norm", "space_to_depth", "to_float")

_NAMES = (
    *_TENSORS,
    *_OPERATORS,
    *(f"math.{name}" for name in _MATH),
    *(f"nn.{name}" for name in _NETWORKS),
    *(f"linalg.{name}" for name in _LINEAR_ALGEBRA),
    *(f"image.{name}" for name in _IMAGES),
    *(f"quantization.{name}" for name in _QUANTIZATION),
)
FUNCTIONS = frozenset((*_NAMES, *(f"compat.v1.{name}" for name in (*_NAMES, *_VERSION_1))))

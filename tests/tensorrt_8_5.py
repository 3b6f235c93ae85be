"""What the Python bindings of TensorRT 8.5 (JetPack 5) have, as far as it is used: read in their source.

No index has these bindings; 8.6.1 is the oldest. Read in NVIDIA/TensorRT on 2026-11-22:

- python/src/infer/pyCore.cpp at 768d994 (it has PreviewFeature.FASTER_DYNAMIC_SHAPES_0805, and no hardware
  compatibility, which came with 8.6)
- python/src/infer/pyGraph.cpp at 2e6172f (LayerType.ONE_HOT is there, CAST of 8.6 is not)
- python/src/infer/pyFoundationalTypes.cpp at 1d6bf36 (DataType.UINT8 is there, FP8 of 8.6 is not)
- python/src/parsers/pyOnnx.cpp at 052281f (from before 8.6, which has the parser's flags: whether it is that of 8.5
  or older it does not say, and what is in both is in 8.5)
"""

from __future__ import annotations

# Method → its parameters' names; property → whether it can be set.
MEMBERS: dict[str, tuple[str, ...] | bool] = {
    "Builder": ("logger",),
    "Builder.create_network": ("flags",),
    "Builder.create_builder_config": (),
    "Builder.create_optimization_profile": (),
    "Builder.build_serialized_network": ("network", "config"),
    "OnnxParser": ("network", "logger"),
    "OnnxParser.parse_from_file": ("model",),
    "OnnxParser.num_errors": False,
    "OnnxParser.get_error": ("index",),
    "ParserError.node": (),
    "ParserError.desc": (),
    "INetworkDefinition.num_inputs": False,
    "INetworkDefinition.num_layers": False,
    "INetworkDefinition.get_input": ("index",),
    "INetworkDefinition.get_layer": ("index",),
    "ILayer.name": True,
    "ILayer.num_outputs": False,
    "ILayer.get_output": ("index",),
    "ITensor.name": True,
    "ITensor.shape": True,
    "ITensor.dtype": True,
    "IOptimizationProfile.set_shape": ("input", "min", "opt", "max"),
    "IBuilderConfig.set_memory_pool_limit": ("pool", "pool_size"),
    "IBuilderConfig.profiling_verbosity": True,
    "IBuilderConfig.set_flag": ("flag",),
    "IBuilderConfig.clear_flag": ("flag",),
    "IBuilderConfig.add_optimization_profile": ("profile",),
    "IBuilderConfig.default_device_type": True,
    "IBuilderConfig.DLA_core": True,
    "IBuilderConfig.can_run_on_DLA": ("layer",),
    "IBuilderConfig.create_timing_cache": ("serialized_timing_cache",),
    "IBuilderConfig.set_timing_cache": ("cache", "ignore_mismatch"),
    "IBuilderConfig.get_timing_cache": (),
    "ITimingCache.serialize": (),
    "Runtime": ("logger",),
    "Runtime.DLA_core": True,
    "Runtime.deserialize_cuda_engine": ("serialized_engine",),
    "ICudaEngine.create_execution_context": (),
    "ICudaEngine.create_engine_inspector": (),
    "ICudaEngine.num_io_tensors": False,
    "ICudaEngine.get_tensor_name": ("index",),
    "ICudaEngine.get_tensor_mode": ("name",),
    "ICudaEngine.get_tensor_dtype": ("name",),
    "ICudaEngine.get_tensor_shape": ("name",),
    "ICudaEngine.get_tensor_profile_shape": ("name", "profile_index"),
    "EngineInspector.get_engine_information": ("format",),
    "IExecutionContext.set_input_shape": ("name", "shape"),
    "IExecutionContext.get_tensor_shape": ("name",),
    "IExecutionContext.set_tensor_address": ("name", "memory"),
    "IExecutionContext.execute_async_v3": ("stream_handle",),
    "ILogger": (),
    "ILogger.log": ("severity", "msg"),
}
# Of these enumerations, all that 8.5 has.
VALUES: dict[str, tuple[str, ...]] = {
    "BuilderFlag": (
        *("FP16", "INT8", "DEBUG", "GPU_FALLBACK", "STRICT_TYPES", "REFIT", "DISABLE_TIMING_CACHE", "TF32"),
        *("SPARSE_WEIGHTS", "SAFETY_SCOPE", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"),
        *("DIRECT_IO", "REJECT_EMPTY_ALGORITHMS", "ENABLE_TACTIC_HEURISTIC"),
    ),
    "DataType": ("FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8"),
    "DeviceType": ("GPU", "DLA"),
    "ILogger.Severity": ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"),
    "LayerInformationFormat": ("ONELINE", "JSON"),
    "MemoryPoolType": ("WORKSPACE", "DLA_MANAGED_SRAM", "DLA_LOCAL_DRAM", "DLA_GLOBAL_DRAM"),
    "NetworkDefinitionCreationFlag": ("EXPLICIT_BATCH", "EXPLICIT_PRECISION"),
    "ProfilingVerbosity": ("LAYER_NAMES_ONLY", "DETAILED", "NONE", "DEFAULT", "VERBOSE"),
    "TensorIOMode": ("NONE", "INPUT", "OUTPUT"),
}
# Not in 8.5 (nor in 8.6, but for the parser's flags), and only used where they are there.
LATER = ("ComputeCapability", "IProgressMonitor", "OnnxParserFlag")

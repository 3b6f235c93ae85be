# Asks of its users what ncnn's packages for Android ask (NCNN_DISABLE_RTTI and NCNN_DISABLE_EXCEPTION, on there).
add_library(ncnn INTERFACE IMPORTED)
set_target_properties(ncnn PROPERTIES
    INTERFACE_COMPILE_OPTIONS "-fno-rtti;-fno-exceptions;-DASKED_FOR"
    INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}")

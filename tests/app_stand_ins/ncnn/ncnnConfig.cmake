# Asks of its users what ncnn's packages for Android ask (NCNN_DISABLE_RTTI and NCNN_DISABLE_EXCEPTION, on there), or,
# with $ENV{NCNN_ASKS} empty, nothing, as those for desktops.
add_library(ncnn INTERFACE IMPORTED)
set_target_properties(ncnn PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}")
if(NOT "$ENV{NCNN_ASKS}" STREQUAL "")
    set_target_properties(ncnn PROPERTIES INTERFACE_COMPILE_OPTIONS "-fno-rtti;-fno-exceptions;-DASKED_FOR")
endif()

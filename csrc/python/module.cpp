// smoothquant_kernels._kernels: what the library was built with, its tables, and the plans that it
// makes. Python ring: no torch, no CUDA, so it can be built and loaded on any machine.
//
// pybind11 has no option for Python's stable ABI (3.1 does not compile with Py_LIMITED_API), so
// this module fits only the Python that built it. So it is optional. The ops are in the library,
// which holds no Python symbols, so one wheel still serves every Python and many versions of torch.
// Another Python does not find the module, because its suffix differs. It then lacks only what
// describes the kernels: doctor's tables, the tuner and SQK_TUNE_CACHE.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/plans.h"
#include "python/tables.h"

// The build defines these. A module that a test builds by itself has none of them.
#define SQK_TEXT_OF(...) #__VA_ARGS__
#define SQK_TEXT(...) SQK_TEXT_OF(__VA_ARGS__)
#ifndef SQK_ARCHS
#define SQK_ARCHS
#endif
#ifndef SQK_CUTLASS_VERSION
#define SQK_CUTLASS_VERSION
#endif
#ifndef SQK_CUDA_VERSION
#define SQK_CUDA_VERSION
#endif
#ifndef SQK_TORCH_TARGET
#define SQK_TORCH_TARGET
#endif

namespace py = pybind11;

namespace sqk::python {
namespace {

py::dict built_with() {
  py::dict found;
  py::list archs;
  for (py::handle arch : py::str(SQK_TEXT(SQK_ARCHS)).attr("split")("/")) {
    if (py::len(arch) > 0) archs.append(arch);
  }
  found["archs"] = archs;
  found["cutlass_version"] = SQK_TEXT(SQK_CUTLASS_VERSION);
  found["cuda_version"] = SQK_TEXT(SQK_CUDA_VERSION);
  found["torch_target"] = SQK_TEXT(SQK_TORCH_TARGET);
  found["tuning"] = SQK_TUNING != 0;
  return found;
}

Entries entries(const std::optional<std::string>& library) {
  return library ? entries_of(*library) : own_entries();
}

Device make_device(int32_t sms, int32_t capability, int32_t shared_bytes, bool wgmma, bool part) {
  return {sms, capability, shared_bytes, wgmma, part};
}

}  // namespace
}  // namespace sqk::python

PYBIND11_MODULE(_kernels, module) {
  using namespace pybind11::literals;
  using namespace sqk::python;
  using sqk::Device;
  using sqk::Entries;
  module.doc() = "What the CUDA library was built with, its tables, and the plans that it makes.";
  module.attr("built_with") = built_with();

  // Local to the module, because a test loads a second module, which has the tuner's candidates.
  py::class_<Device>(module, "Device", py::module_local())
      .def(py::init(&make_device), py::kw_only(), "sms"_a, "capability"_a, "shared_bytes"_a,
           "wgmma"_a = false, "part"_a = false)
      .def_readonly("sms", &Device::sms)
      .def_readonly("capability", &Device::capability)
      .def_readonly("shared_bytes", &Device::shared_bytes)
      .def_readonly("wgmma", &Device::wgmma)
      .def_readonly("part", &Device::part);

  py::class_<Entries>(module, "Library", py::module_local())
      .def(py::init(&entries), "path"_a = py::none())
      .def("gemm_tables", &gemm_tables)
      .def("quantize_paths", &quantize_paths)
      .def("current_device", &current_device)
      .def("plan_gemm", &plan_gemm, "m"_a, "n"_a, "k"_a, "device"_a = py::none())
      .def("plan_quantize", &plan_quantize, "m"_a, "k"_a, "device"_a, py::kw_only(),
           "producer"_a = "quantize", "scheme"_a = "token", "dtype"_a = "float16", "rotation"_a = 0)
      .def("use_measured", &use_measured, "table"_a, "sms"_a, "rows"_a)
      .def("without_tiles", &without_tiles, "names"_a);
}

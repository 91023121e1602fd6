#include "module/ring.h"

#include <cstdint>
#include <string>

#include "ring/shared_memory.h"

namespace py = pybind11;

namespace engine {
namespace {

using ring::Dtype;
using ring::Op;
using ring::SharedMemory;

// `address`: numel elements of `dtype`, contiguous. `warn` is called with a text where a peer is slow.
void all_reduce(SharedMemory& memory, uintptr_t address, size_t numel, Dtype dtype, Op op, double timeout,
                const py::object& warn) {
    const auto poll = [&](const std::string& text) {
        py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals()) throw py::error_already_set();  // Ctrl-C ends the wait
        if (!text.empty()) warn(text);
    };
    py::gil_scoped_release nogil;
    memory.all_reduce(reinterpret_cast<void*>(address), numel, dtype, op, timeout, poll);
}

}  // namespace

void bind_ring(py::module_& m) {
    py::register_exception<ring::PeerFailure>(m, "PeerFailure", PyExc_RuntimeError);
    py::enum_<Dtype>(m, "RingDtype")
        .value("float32", Dtype::float32)
        .value("float64", Dtype::float64)
        .value("float16", Dtype::float16)
        .value("bfloat16", Dtype::bfloat16)
        .value("int32", Dtype::int32)
        .value("int64", Dtype::int64);
    py::enum_<Op>(m, "RingOp").value("sum", Op::sum).value("avg", Op::avg).value("max", Op::max).value("min", Op::min);
    py::class_<SharedMemory>(m, "SharedMemory", "All-reduce among the ranks of one host through shared memory.")
        .def(py::init<int, int, const std::string&>(), py::arg("rank"), py::arg("world_size"), py::arg("token"))
        .def_property_readonly("descriptor", &SharedMemory::descriptor)
        .def("close_descriptor", &SharedMemory::close_descriptor)
        .def("open_peer", &SharedMemory::open_peer, py::arg("rank"), py::arg("pid"), py::arg("descriptor"),
             py::arg("token"), py::arg("host"))
        .def("all_reduce", &all_reduce, py::arg("address"), py::arg("numel"), py::arg("dtype"), py::arg("op"),
             py::arg("timeout"), py::arg("warn"));
}

}  // namespace engine

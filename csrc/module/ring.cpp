#include "module/ring.h"

#include <cstdint>
#include <string>

#include "ring/shared_memory.h"

namespace py = pybind11;

namespace engine {
namespace {

using ring::Call;
using ring::Codec;
using ring::Dtype;
using ring::Kind;
using ring::Op;
using ring::SharedMemory;

// Addresses of contiguous memory (0: none), as SharedMemory::run says. `warn` is called with a text where a peer is
// slow.
void run(SharedMemory& memory, uint64_t number, Kind kind, uintptr_t in, uintptr_t out, uint64_t numel, Dtype dtype,
         Op op, Codec codec, double density, bool compare, double timeout, const py::object& warn) {
    const auto poll = [&](const std::string& text) {
        py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals()) throw py::error_already_set();  // Ctrl-C ends the wait
        if (!text.empty()) warn(text);
    };
    const Call call{number, kind, dtype, op, codec, numel, density, compare};
    py::gil_scoped_release nogil;
    memory.run(call, reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), timeout, poll);
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
    py::enum_<Kind>(m, "RingKind")
        .value("all_reduce", Kind::all_reduce)
        .value("reduce_scatter", Kind::reduce_scatter)
        .value("all_gather", Kind::all_gather);
    py::enum_<Codec>(m, "RingCodec")
        .value("none", Codec::none)
        .value("bf16", Codec::bf16)
        .value("int8", Codec::int8)
        .value("bitmap", Codec::bitmap);
    py::class_<SharedMemory>(m, "SharedMemory", "Collectives among the ranks of one host through shared memory.")
        .def(py::init<int, int, const std::string&>(), py::arg("rank"), py::arg("world_size"), py::arg("token"))
        .def_property_readonly("descriptor", &SharedMemory::descriptor)
        .def("close_descriptor", &SharedMemory::close_descriptor)
        .def("open_peer", &SharedMemory::open_peer, py::arg("rank"), py::arg("pid"), py::arg("descriptor"),
             py::arg("token"), py::arg("host"))
        .def("run", &run, py::arg("number"), py::arg("kind"), py::arg("input"), py::arg("output"), py::arg("numel"),
             py::arg("dtype"), py::arg("op"), py::arg("codec"), py::arg("density"), py::arg("compare"),
             py::arg("timeout"), py::arg("warn"))
        .def("interrupt", &SharedMemory::interrupt, py::arg("text"))
        .def("fail", &SharedMemory::fail, py::arg("text"))
        .def("lost", &SharedMemory::lost);
}

}  // namespace engine

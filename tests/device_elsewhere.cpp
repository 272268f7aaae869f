// A device that is not here: torch's private backend, with the memory and the kernels of the CPU and the manners of
// CUDA. Operands on two devices, a generator of the other device and values asked for in place raise as they do there.
// Compiled by tests/device_elsewhere.py.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Operators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Generator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using c10::DeviceType;
using c10::IValue;
using c10::DispatchKey;
constexpr DeviceType HERE = DeviceType::PrivateUse1;
const c10::Device DEVICE(HERE, 0);

// ---- memory: the host's, under another name

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr data = c10::GetCPUAllocator()->allocate(bytes);
    void* pointer = data.get();
    return {pointer, new c10::DataPtr(std::move(data)), &release, DEVICE};
  }
  static void release(void* held) { delete static_cast<c10::DataPtr*>(held); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &allocator)

void release_storage(void* held) { delete static_cast<c10::Storage*>(held); }

// The same bytes as another device's storage, which stays alive as long as this one.
c10::Storage shared(const c10::Storage& storage, c10::Device device) {
  c10::Allocator* own = device.is_cpu() ? c10::GetCPUAllocator() : &allocator;
  c10::DataPtr data(const_cast<void*>(storage.data()), new c10::Storage(storage), &release_storage, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), own, true);
}

Tensor tensor_of(const c10::Storage& storage, const Tensor& like, DispatchKey key) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

Tensor on_cpu(const Tensor& t) { return tensor_of(shared(t.storage(), c10::kCPU), t, DispatchKey::CPU); }
Tensor put_here(const Tensor& t) { return tensor_of(shared(t.storage(), DEVICE), t, DispatchKey::PrivateUse1); }

bool is_here(const Tensor& t) { return t.defined() && t.device().type() == HERE; }

// ---- random numbers: a generator of this device, its numbers drawn by one of the CPU

struct Generator final : c10::GeneratorImpl {
  Generator() : GeneratorImpl(DEVICE, c10::DispatchKeySet(DispatchKey::PrivateUse1)), cpu(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* copy = new Generator();
    copy->cpu = cpu.clone();
    return copy;
  }
  at::Generator cpu;
};

const at::Generator& default_generator() {
  static at::Generator made = at::make_generator<Generator>();
  return made;
}

at::Generator drawing(const std::optional<at::Generator>& given) {
  if (!given.has_value() || !given->defined())
    return static_cast<Generator*>(default_generator().unsafeGetGeneratorImpl())->cpu;
  TORCH_CHECK(given->device().type() == HERE, "Expected a '", DEVICE.str(), "' device type for generator but found '", given->device().type(), "'");
  return static_cast<Generator*>(given->unsafeGetGeneratorImpl())->cpu;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DataPtr data = allocator.allocate(bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    const_cast<c10::Storage&>(storage).set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::PrivateUse1> {
  c10::Device getDevice() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---- every other operator: operands are checked, the CPU computes on the same bytes, its results are put here

bool takes_cpu_indices(const std::string& name) {  // as CUDA's do
  return name == "aten::index" || name == "aten::index_put" || name == "aten::_index_put_impl_" || name == "aten::_unsafe_index" ||
      name == "aten::index_put_" || name == "aten::_unsafe_index_put" || name == "aten::tensor_split" || name == "aten::_pack_padded_sequence";
}

struct Call {
  const c10::OperatorHandle& op;
  std::vector<std::pair<Tensor, Tensor>> operands;  // here, the same bytes on the CPU
  bool anything_here = false, target = false;

  void look_at(const IValue& value) {
    if (value.isTensor()) anything_here = anything_here || is_here(value.toTensor());
    if (value.isList())
      for (const IValue each : value.toList()) look_at(each);
    if (value.isDevice()) target = target || value.toDevice().type() == HERE;
  }

  Tensor lowered(const Tensor& t, const c10::Argument& argument, bool indices) {
    if (!t.defined()) return t;
    if (!is_here(t)) {
      bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
      bool harmless = t.device().is_cpu() && (indices || t.dim() == 0) && !written;
      TORCH_CHECK(!anything_here || harmless, "Expected all tensors to be on the same device, but got ", argument.name(),
          " is on ", t.device(), ", different from other tensors on ", DEVICE, " (when checking argument in ", op.schema().name(), ")");
      return t;
    }
    for (auto& [original, alias] : operands)
      if (original.is_same(t)) return alias;
    operands.emplace_back(t, on_cpu(t));
    return operands.back().second;
  }

  IValue lowered(const IValue& value, const c10::Argument& argument, bool indices) {
    if (value.isTensor()) return lowered(value.toTensor(), argument, indices);
    if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& each : value.toTensorVector()) made.push_back(lowered(each, argument, false));
      return made;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> made;
      for (const std::optional<Tensor>& each : value.toOptionalTensorList().vec())
        made.push_back(each.has_value() ? std::optional<Tensor>(lowered(*each, argument, indices)) : std::nullopt);
      return made;
    }
    if (value.isDevice() && value.toDevice().type() == HERE) return c10::Device(c10::kCPU);
    if (value.isGenerator()) return IValue(drawing(value.toGenerator()));
    if (value.isNone() && argument.name() == "generator") return IValue(drawing(std::nullopt));
    return value;
  }

  Tensor raised(const Tensor& t) {
    if (!t.defined() || !t.device().is_cpu()) return t;
    for (auto& [original, alias] : operands)
      if (alias.is_same(t)) return original;
    for (auto& [original, alias] : operands)  // a view
      if (t.has_storage() && t.storage().unsafeGetStorageImpl() == alias.storage().unsafeGetStorageImpl())
        return tensor_of(original.storage(), t, DispatchKey::PrivateUse1);
    return put_here(t);
  }

  IValue raised(const IValue& value) {
    if (value.isTensor()) return raised(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& each : value.toTensorVector()) made.push_back(raised(each));
      return made;
    }
    return value;
  }

  // out= tensors that the CPU's kernel gave another size
  void resized() {
    for (auto& [original, alias] : operands) {
      if (original.sizes() == alias.sizes() && original.storage().data() == alias.storage().data()) continue;
      if (original.storage().data() != alias.storage().data()) {
        c10::Storage fresh = shared(alias.storage(), DEVICE);
        original.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(fresh));
      }
      original.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
    }
  }
};

// torch turns some functions into their out= forms for devices that it does not know, of mse_loss into one that warns.
struct ButForResizing final : c10::WarningHandler {
  void process(const c10::Warning& warning) override {
    if (warning.msg().find("An output with one or more elements was resized") == std::string::npos) before->process(warning);
  }
  c10::WarningHandler* before = c10::WarningUtils::get_warning_handler();
};

void anything(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t start = stack->size() - arguments.size();
  Call call{op, {}};
  for (size_t i = start; i < stack->size(); i++) call.look_at((*stack)[i]);
  const bool indices = takes_cpu_indices(op.schema().name());
  for (size_t i = 0; i < arguments.size(); i++)
    (*stack)[start + i] = call.lowered((*stack)[start + i], arguments[i], indices && arguments[i].name() != "self" && arguments[i].name() != "values");
  {
    ButForResizing handler;
    c10::WarningUtils::WarningHandlerGuard quiet(&handler);
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  call.resized();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++) (*stack)[i] = call.raised((*stack)[i]);
}

// ---- what has to be said by hand

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
      c10::DispatchKeySet(DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

Tensor zeros(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> device, std::optional<bool> pin) {
  return empty(size, dtype, layout, device, pin, std::nullopt).zero_();
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset.has_value()) start = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor copy_from(const Tensor& self, const Tensor& dst, bool) {
  Tensor to = is_here(dst) ? on_cpu(dst) : dst;
  to.copy_(is_here(self) ? on_cpu(self) : self);
  return dst;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}

at::Scalar value_of(const Tensor& self) { return on_cpu(self).item(); }

Tensor& set_storage(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset.guard_int(__FILE__, __LINE__), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
Tensor& set_whole_storage(Tensor& self, at::Storage source) { return at::native::set_(self, std::move(source)); }

void same_device(const Tensor& a, const std::optional<Tensor>& b) {
  TORCH_CHECK(!b.has_value() || !b->defined() || a.device() == b->device(),
      "Expected all tensors to be on the same device, but found at least two devices, ", a.device(), " and ", b->device(), "!");
}

Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  same_device(x, w);
  same_device(x, b);
  std::optional<Tensor> bias = b.has_value() && b->defined() ? std::optional<Tensor>(on_cpu(*b)) : std::nullopt;
  at::AutoDispatchBelowADInplaceOrView below;
  return put_here(at::convolution_symint(on_cpu(x), on_cpu(w), bias, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& w, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups,
    std::array<bool, 3> mask) {
  same_device(x, w);
  same_device(x, grad);
  at::AutoDispatchBelowADInplaceOrView below;
  auto [gx, gw, gb] = at::convolution_backward_symint(on_cpu(grad), on_cpu(x), on_cpu(w), c10::SymIntArrayRef({w.size(transposed ? 1 : 0) * (transposed ? groups : c10::SymInt(1))}),
      stride, padding, dilation, transposed, output_padding, groups, mask);
  auto back = [](const Tensor& t) { return t.defined() ? put_here(t) : t; };
  return {back(gx), back(gw), back(gb)};
}

int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // the mathematical form
}

// The cells of recurrent layers, which are one kernel each on devices other than the CPU.

Tensor with_bias(const Tensor& gates, const std::optional<Tensor>& bias) {
  return bias.has_value() && bias->defined() ? gates + *bias : gates;
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cx,
    const std::optional<Tensor>& input_bias, const std::optional<Tensor>& hidden_bias) {
  auto gates = with_bias(input_gates, input_bias).add(with_bias(hidden_gates, hidden_bias)).chunk(4, 1);
  Tensor i = gates[0].sigmoid(), f = gates[1].sigmoid(), g = gates[2].tanh(), o = gates[3].sigmoid();
  Tensor cy = f * cx + i * g;
  return {o * cy.tanh(), cy, at::cat({i, f, g, o}, 1)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const std::optional<Tensor>& grad_hy, const std::optional<Tensor>& grad_cy,
    const Tensor& cx, const Tensor& cy, const Tensor& workspace, bool has_bias) {
  auto parts = workspace.chunk(4, 1);
  Tensor i = parts[0], f = parts[1], g = parts[2], o = parts[3], squashed = cy.tanh();
  Tensor h = grad_hy.has_value() && grad_hy->defined() ? *grad_hy : at::zeros_like(cy);
  Tensor c = h * o * (1 - squashed * squashed);
  if (grad_cy.has_value() && grad_cy->defined()) c = c + *grad_cy;
  Tensor gates = at::cat({c * g * i * (1 - i), c * cx * f * (1 - f), c * i * (1 - g * g), h * squashed * o * (1 - o)}, 1);
  return {gates, c * f, has_bias ? gates.sum(0) : Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hx,
    const std::optional<Tensor>& input_bias, const std::optional<Tensor>& hidden_bias) {
  auto x = with_bias(input_gates, input_bias).chunk(3, 1), h = with_bias(hidden_gates, hidden_bias).chunk(3, 1);
  Tensor r = (x[0] + h[0]).sigmoid(), z = (x[1] + h[1]).sigmoid(), n = (x[2] + r * h[2]).tanh();
  return {(1 - z) * n + z * hx, at::cat({r, z, n, hx, h[2]}, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad, const Tensor& workspace, bool has_bias) {
  auto parts = workspace.chunk(5, 1);
  Tensor r = parts[0], z = parts[1], n = parts[2], hx = parts[3], hidden = parts[4];
  Tensor to_n = grad * (1 - z) * (1 - n * n), to_z = grad * (hx - n) * z * (1 - z), to_r = to_n * hidden * r * (1 - r);
  Tensor input_gates = at::cat({to_r, to_z, to_n}, 1), hidden_gates = at::cat({to_r, to_z, to_n * r}, 1);
  return {input_gates, hidden_gates, grad * z, has_bias ? input_gates.sum(0) : Tensor(), has_bias ? hidden_gates.sum(0) : Tensor()};
}

std::tuple<Tensor, Tensor> dropout(const Tensor& x, double p, std::optional<bool> train) {
  Tensor kept = at::empty_like(x, x.options().dtype(at::kBool));
  if (train.has_value() && !*train) return {x.clone(), kept.fill_(true)};
  kept.bernoulli_(1 - p);
  return {p == 1 ? at::zeros_like(x) : x * kept * (1 / (1 - p)), kept};
}

// As between the CPU and CUDA: `model.to(device)` keeps its parameters' identity.
bool compatible(const Tensor&, const Tensor&) { return true; }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&anything>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_efficientzerotensor", zeros);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", resize_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", value_of);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_fused_sdp_choice", plain_attention);
  m.impl("native_dropout", dropout);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
  m.impl("_has_compatible_shallow_copy_type", compatible);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
}

// The default generator, for the device's module in Python.
at::Generator drawn_from() { return drawing(std::nullopt); }

TORCH_LIBRARY(elsewhere, m) {
  m.def("seed(int seed) -> ()", [](int64_t seed) { drawn_from().set_current_seed(seed); });
  m.def("state() -> Tensor", []() { return Tensor::wrap_tensor_impl(drawn_from().unsafeGetGeneratorImpl()->get_state()); });
  m.def("set_state(Tensor state) -> ()", [](const Tensor& state) { drawn_from().set_state(state.clone()); });
}

struct Registered {
  Registered() { at::RegisterPrivateUse1HooksInterface(new Hooks()); }
} registered;

}  // namespace

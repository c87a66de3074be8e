// The fake device: a torch device (PrivateUse1) with the CPU's memory and kernels. As with a GPU, its tensors cannot be
// mixed with the CPU's. Operations that would wait for a GPU are counted or refused. `fake_device.py` builds and
// registers it.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/op_registration/op_registration.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Tensor;
using std::optional;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device FAKE(KIND, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

// ---- memory, streams and generators: the minimum that torch requires

struct Memory final : c10::Allocator {
  static void release(void* memory) { std::free(memory); }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    return {memory, memory, &release, FAKE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return FAKE; }
  c10::Device getDevice() const override { return FAKE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, FAKE); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(0);
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(0); }
};
const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// ---- operations that wait for a GPU (synchronize)

std::atomic<int64_t> synchronizations{0};
std::atomic<bool> refusing{false};
void synchronize(const std::string& operation) {
  synchronizations++;
  TORCH_CHECK(!refusing, "fake_device: ", operation, " waits for the device");
}
const std::unordered_set<std::string> SYNCHRONIZING = {
    "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_consecutive", "aten::unique_dim", "aten::repeat_interleave.Tensor", "aten::bincount"};

// ---- tensors

bool is_fake(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == KIND; }

// Returns a CPU tensor that shares the memory; if it is resized beyond its storage, it gets new memory.
Tensor as_cpu(const Tensor& tensor) {
  if (!is_fake(tensor)) return tensor;
  auto storage = new c10::Storage(tensor.storage());
  c10::DataPtr data(storage->mutable_data(), storage, [](void* held) { delete static_cast<c10::Storage*>(held); },
                    c10::Device(c10::kCPU));
  c10::Storage shared(c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(data), c10::GetCPUAllocator(),
                      true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(shared), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                        tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  result._set_conj(tensor.is_conj());
  result._set_neg(tensor.is_neg());
  return result;
}

Tensor view_of(const Tensor& base, const Tensor& viewed) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(base.storage()), KEYS, viewed.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(viewed.sizes(), viewed.strides(), viewed.storage_offset());
  return result;
}

Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<c10::Device>,
             optional<bool>, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, at::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<c10::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, at::dtype_or_default(dtype));
}

Tensor copied_to_fake(const Tensor& tensor) {
  auto result = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(FAKE));
  as_cpu(result).copy_(tensor);
  return result;
}

const Tensor& resize(const Tensor& self, IntArrayRef size, optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t needed = (impl->numel() + impl->storage_offset()) * self.dtype().itemsize();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (storage->nbytes() < needed) {
    auto fresh = memory.allocate(needed);
    if (storage->nbytes()) std::memcpy(fresh.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(fresh));
    storage->set_nbytes(needed);
  }
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  if (!is_fake(to)) synchronize("a copy to the CPU");
  as_cpu(to).copy_(as_cpu(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const Tensor& self) {
  synchronize("reading a number");
  return as_cpu(self).item();
}

Tensor& set_part(Tensor& self, c10::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_whole(Tensor& self, c10::Storage storage) {
  int64_t count = storage.nbytes() / self.dtype().itemsize();
  return set_part(self, std::move(storage), 0, {count}, {1});
}

// ---- all other operations run the CPU's kernels

// As on GPUs, zero-dimensional tensors and indices may be on the CPU.
const std::unordered_set<std::string> MAY_MIX = {"aten::index.Tensor", "aten::index_put", "aten::index_put_",
                                                 "aten::_index_put_impl_"};

// Replaces each tensor in an argument or a result by what `convert` returns for it.
void replace(c10::IValue& value, const std::function<Tensor(const Tensor&)>& convert) {
  if (value.isTensor()) {
    value = convert(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> converted_list;
    for (const Tensor& tensor : value.toTensorList()) converted_list.push_back(convert(tensor));
    value = converted_list;
  } else if (value.isOptionalTensorList()) {
    c10::List<optional<Tensor>> converted_list;
    for (const optional<Tensor>& tensor : value.toOptionalTensorList().vec())
      converted_list.push_back(tensor ? optional<Tensor>(convert(*tensor)) : std::nullopt);
    value = converted_list;
  }
}

void run_on_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  const auto name = c10::toString(operation.operator_name());
  bool fake = false, cpu = false, masks = false;
  std::vector<std::pair<Tensor, Tensor>> converted;  // tensors of the fake device, and as the CPU's
  auto convert = [&](const Tensor& tensor) -> Tensor {
    fake |= is_fake(tensor);
    cpu |= tensor.defined() && !is_fake(tensor) && tensor.dim() > 0;
    masks |= is_fake(tensor) && tensor.dtype() == at::kBool;
    if (!is_fake(tensor)) return tensor;
    for (auto& [fake_tensor, cpu_tensor] : converted)
      if (fake_tensor.is_same(tensor)) return cpu_tensor;
    return converted.emplace_back(tensor, as_cpu(tensor)).second;
  };
  const auto first = stack->size() - schema.arguments().size();
  for (size_t i = first; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    replace(value, convert);
    if (value.isDevice()) value = c10::Device(c10::kCPU);
  }
  TORCH_CHECK(!fake || !cpu || MAY_MIX.count(name), "fake_device: ", name, " mixes tensors of two devices");
  if (fake && (SYNCHRONIZING.count(name) || (MAY_MIX.count(name) && masks))) synchronize(name);
  operation.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [fake_tensor, cpu_tensor] : converted) {  // results that the operation resized
    if (cpu_tensor.sizes() == fake_tensor.sizes() && cpu_tensor.strides() == fake_tensor.strides()) continue;
    if (cpu_tensor.storage().data() == fake_tensor.storage().data()) {
      fake_tensor.unsafeGetTensorImpl()->set_sizes_and_strides(cpu_tensor.sizes(), cpu_tensor.strides(),
                                                               cpu_tensor.storage_offset());
    } else {
      fake_tensor.resize_(cpu_tensor.sizes());
      as_cpu(fake_tensor).copy_(cpu_tensor);
    }
  }
  auto back = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined()) return tensor;
    for (auto& [fake_tensor, cpu_tensor] : converted)
      if (cpu_tensor.is_same(tensor)) return fake_tensor;
    for (auto& [fake_tensor, cpu_tensor] : converted)
      if (tensor.storage().data() && tensor.storage().data() == cpu_tensor.storage().data())
        return view_of(fake_tensor, tensor);
    return copied_to_fake(tensor);
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) replace((*stack)[i], back);
}

// Devices other than the CPU have their own operators for convolutions.
Tensor convolution(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  bool biased = bias && bias->defined();
  TORCH_CHECK(is_fake(input) && is_fake(weight) && (!biased || is_fake(*bias)),
              "fake_device: a convolution mixes tensors of two devices");
  return copied_to_fake(at::convolution(as_cpu(input), as_cpu(weight), biased ? optional<Tensor>(as_cpu(*bias)) : bias,
                                     stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& input,
                                                        const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
                                                        IntArrayRef dilation, bool transposed,
                                                        IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> wanted) {
  std::vector<int64_t> bias{transposed ? weight.size(1) * groups : weight.size(0)};
  auto [a, b, c] = at::convolution_backward(as_cpu(gradient), as_cpu(input), as_cpu(weight),
                                            wanted[2] ? at::OptionalIntArrayRef(bias) : at::OptionalIntArrayRef(),
                                            stride, padding, dilation, transposed, output_padding, groups, wanted);
  auto back = [](const Tensor& tensor) { return tensor.defined() ? copied_to_fake(tensor) : tensor; };
  return {back(a), back(b), back(c)};
}

int64_t unfused_attention(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, double, bool,
                                     optional<double>, bool) {
  return 0;
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("resize_", &resize);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("set_.source_Storage", &set_whole);
  library.impl("set_.source_Storage_storage_offset", &set_part);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
  library.impl("_fused_sdp_choice", &unfused_attention);
  for (auto name : {"native_group_norm", "native_layer_norm"})  // otherwise torch composes them, with other rounding
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}
TORCH_LIBRARY(fake_device, library) {
  library.def("synchronizations() -> int", []() -> int64_t { return synchronizations; });
  library.def("refuse_synchronizing(bool refuse) -> ()", [](bool refuse) { refusing = refuse; });
}

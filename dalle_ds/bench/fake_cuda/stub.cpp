// A stub of a CUDA device: torch sees one device, and nothing is ever computed on it.
//
// FakeTensor computes shapes without a device, but autograd calls torch's CUDA backend for streams and devices, and a CPU build
// of torch has no CUDA backend. This file implements the calls that autograd makes. `fake_cuda_install` installs the stub,
// `fake_cuda_remove` removes it.
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

const Device only_device{DeviceType::CUDA, 0};
const Stream stream{Stream::DEFAULT, only_device};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return only_device; }
  Device getDevice() const override { return only_device; }
  Stream getStream(Device) const noexcept override { return stream; }
  Stream getDefaultStream(Device) const override { return stream; }
  Stream getNewStream(Device, int) const override { return stream; }
  Stream getStreamFromGlobalPool(Device, bool) const override { return stream; }
  Stream exchangeStream(Stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

// Draws nothing, since fake tensors have no values. It exists because callers check the device of a generator.
struct Generator final : c10::GeneratorImpl {
  uint64_t seed_ = c10::default_rng_seed_val;
  Generator() : GeneratorImpl(only_device, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { seed_ = seed; }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override { return seed_; }
  void set_state(const c10::TensorImpl&) override { TORCH_CHECK(false, "the fake CUDA generator has no state"); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { TORCH_CHECK(false, "the fake CUDA generator has no state"); }
  GeneratorImpl* clone_impl() const override { return new Generator(); }
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<Generator>(); }
};

// torch creates its hooks at import and hands out references to them, so our hooks overwrite them in place.
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
auto* hooks() { return const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()); }
auto& guards() { return c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)]; }
const c10::impl::DeviceGuardImplInterface* guard_before = nullptr;

} // namespace

extern "C" void fake_cuda_install() {
  static const auto* guard = new Guard();
  guard_before = guards().exchange(guard);
  new (hooks()) Hooks();
}

extern "C" void fake_cuda_remove() {
  guards().store(guard_before);
  new (hooks()) at::CUDAHooksInterface();
}

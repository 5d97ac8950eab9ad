// What autograd asks of CUDA, answered in a build of torch that has none.
//
// Loaded with LD_PRELOAD, so that torch's own calls of these few functions come here: there is one
// device, everything on it is done as soon as it is asked for. No memory is behind it, so it serves
// tensors without data alone. Names as in torch 2.13.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <optional>

#define SEEN __attribute__((visibility("default")))

namespace {
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

Stream only_stream() { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return only_stream(); }
  Stream getDefaultStream(Device) const override { return only_stream(); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return only_stream(); }
  Stream getNewStream(Device, int) const override { return only_stream(); }
  Stream exchangeStream(Stream) const noexcept override { return only_stream(); }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
}  // namespace

namespace at::detail {
SEEN const CUDAHooksInterface& getCUDAHooks() {
  static auto* hooks = new Hooks();
  return *hooks;
}
}  // namespace at::detail

namespace at::accelerator {
SEEN std::optional<DeviceType> getAccelerator(bool) { return DeviceType::CUDA; }
SEEN DeviceIndex deviceCount() { return 1; }
SEEN DeviceIndex getDeviceIndex() { return 0; }
SEEN void setDeviceIndex(DeviceIndex) {}
SEEN DeviceIndex exchangeDevice(DeviceIndex) { return 0; }
SEEN DeviceIndex maybeExchangeDevice(DeviceIndex) { return 0; }
SEEN Stream getCurrentStream(DeviceIndex) { return only_stream(); }
SEEN void setCurrentStream(Stream) {}
SEEN void synchronizeDevice(DeviceIndex) {}
}  // namespace at::accelerator

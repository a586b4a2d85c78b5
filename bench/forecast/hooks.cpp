// preloaded into a process that mocks a CUDA device: the autograd engine asks these hooks which devices are in use, and
// those of a CUDA build without a GPU refuse to answer
#include <ATen/detail/CUDAHooksInterface.h>

namespace at::detail {
namespace {
struct MockedHooks final : CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};
}  // namespace

TORCH_API const CUDAHooksInterface& getCUDAHooks() {
  static const MockedHooks hooks;
  return hooks;
}
}  // namespace at::detail

// Small kernels, each correct or with one planted bug, that show what the host layer reports.
#pragma once

namespace latentguard::testing {

// Runs a toy by name; false where there is none of that name.
bool run_toy(const char* name);

}  // namespace latentguard::testing

#pragma once

#include "engine/control.h"

namespace rotunda::cli {

/// From now on the first Ctrl-C sets the flag that is returned, and the next one ends the program at once.
engine::StopFlag catch_interrupt();

}  // namespace rotunda::cli

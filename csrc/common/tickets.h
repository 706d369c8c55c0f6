// Tickets: counters by which the blocks that share a tile's k find out which of them comes last.
// They are 0 before and after every launch, so that no launch needs a memset before it. Kernel
// ring: no torch.
//
// Why this is safe. All tickets are one array of the library, which the GPU clears when it loads
// the code. A part of it, kTickets long, belongs to one owner at a time:
//
//   a stream                  The launches of a stream run one after another. A kernel that was
//                             launched to overlap takes its first ticket after it has waited for
//                             the kernel before it. So there is never more than one launch that
//                             uses the part, and whichever block takes the last ticket of a tile
//                             resets it, when no other block of that launch needs it any more.
//   a stream while captured   The graph, not the stream, is the owner: its replays may run beside
//                             the stream's own launches and beside other graphs. A graph does not
//                             run beside itself. Each stream that takes part in the capture has a
//                             part of its own, because branches of a graph do run beside each
//                             other. The graph holds an object whose destructor gives the part back
//                             when the graph and everything instantiated from it is gone.
//
// A launch that is refused leaves the tickets as they were. A kernel that is aborted leaves any
// values, but takes the context with it, and a new context loads the array anew. Where no part is
// free, or the driver is too old to name streams (before CUDA 12), find_tickets returns nullptr,
// and the caller clears tickets in its workspace.
#pragma once

#include <cstdint>

#include "sqk/status.h"

namespace sqk {

// Enough for two waves of an H100 with two tickets a tile (stream-K), and for plans that split k,
// which have at most two tiles an SM.
constexpr int kTickets = 640;

// kTickets zeros on the current GPU that belong to this stream, or to the graph that it is captured
// into; nullptr if there are none. The kernel must leave zeros.
uint32_t* find_tickets(cudaStream_t stream);

}  // namespace sqk

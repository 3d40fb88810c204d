// When the inputs of outliers are there, in few_ring.cu: those that it shares with the codes, or that have a place of their own.

#pragma once

// Where outliers find the inputs of a few tokens, these come with the stages of the first row block. The barriers of those will not
// do: by then they may be in use for other stages.
INLINE void tell_outliers(const Share& share, const Room& room, int stage) {
  if (OUTLIER_SHARE && !X_TOLD && threadIdx.x == 0 && stage == share.stages - 1) mbarrier_arrive(room.outliers.here);
}
// Inputs that are turned are so by the outliers' warps, of which `thread` is one: shared ones stage by stage, and the warps that multiply
// wait for that.
INLINE void wait_for_inputs(const Arguments& p, const Share& share, const Room& room, int thread) {
  const OutlierRoom& inputs = room.outliers;
  auto turn = [&](int first, int end) {
    for (int tile = first + thread / 32; tile < end; tile += OUTLIER_WARPS) turn_tokens(inputs.x + tile * 256, inputs.x_stride);
  };
  if constexpr (X_TOLD) {
    for (int stage = 0; stage < share.stages; stage++) {
      mbarrier_wait(x_is_here(room, stage), 0);
      if (!X_TURNED) continue;
      const int tile = stage_of(share, stage) * K_WARPS;
      turn(tile, min(tile + K_WARPS, p.k_tiles));
      if (arrives(thread & 31)) mbarrier_arrive(x_is_turned(room, stage));
    }
    if (X_TURNED) mbarrier_wait(x_is_turned(room, share.stages - 1), 0);
  } else {
    mbarrier_wait(inputs.here, 0);
    if (OUTLIERS_TURNED) turn(0, p.k_tiles), barrier_of(3, OUTLIER_THREADS);
  }
}
#if PATCHES
static_assert(X_IN_STAGE && K_WARPS == PATCH_TILES, "a stage's inputs are those of a patch");
// Inputs of patches, stage by stage.
struct PatchInputs {
  const Share& share;
  const Room& room;
  int stages;
  Slot slot;

  INLINE u32 place() const { return shared_address(room.ring) + slot.index * STAGE_BYTES + WEIGHT_BYTES; }
  INLINE void wait() const { mbarrier_wait(room.full + 8 * slot.index, slot.round); }
  INLINE void done() { give_back(share, room, slot.index), slot.next(stages); }
};
#endif
INLINE void init_barriers_of_outliers(const Arguments& p, const Share& share, const Room& room) {
  if (!X_TOLD) return mbarrier_init(room.outliers.here, 1);
  for (int stage = 0; stage < share.stages; stage++) {
    mbarrier_init(x_is_here(room, stage), 1), mbarrier_init(x_is_turned(room, stage), OUTLIER_WARPS * ARRIVALS);
    mbarrier_expect(x_is_here(room, stage), p.M * min(K_WARPS, p.k_tiles - stage_of(share, stage) * K_WARPS) * 256);
  }
}

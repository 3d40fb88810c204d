// One warpgroup MMA: d[64 x TOKENS] (+)= a[64 x STEP] b[STEP x TOKENS], a and d in registers, b in shared memory; STEP is 16
// numbers of two bytes, or with INT8 32 bytes, whose products are added up in integers.
//
// The instruction names every accumulator register, TOKENS / 2 of them, so its text differs for each number of tokens. The
// lists below grow by 8 registers, 16 tokens, at a time; ACCUMULATORS (TOKENS / 2, set from outside) picks one. Operands are
// numbered in the order of declaration: 0-3 the fragment, 4 the descriptor, 5 whether to add to d, then the accumulators.
// The fragment is declared as if it were written, which it is not, so that its numbers come first.

#pragma once
#include "wgmma_work.cuh"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
// IN_REGISTER: how d is named to the instruction, "+r" for integers and "+f" for floats.
#define ACC4(i) IN_REGISTER(d[i]), IN_REGISTER(d[i + 1]), IN_REGISTER(d[i + 2]), IN_REGISTER(d[i + 3])
#define ACC8(i) ACC4(i), ACC4(i + 4)

#define NAMES_8 "%6, %7, %8, %9, %10, %11, %12, %13"
#define NAMES_16 NAMES_8 ", %14, %15, %16, %17, %18, %19, %20, %21"
#define NAMES_24 NAMES_16 ", %22, %23, %24, %25, %26, %27, %28, %29"
#define NAMES_32 NAMES_24 ", %30, %31, %32, %33, %34, %35, %36, %37"
#define NAMES_40 NAMES_32 ", %38, %39, %40, %41, %42, %43, %44, %45"
#define NAMES_48 NAMES_40 ", %46, %47, %48, %49, %50, %51, %52, %53"
#define NAMES_56 NAMES_48 ", %54, %55, %56, %57, %58, %59, %60, %61"
#define NAMES_64 NAMES_56 ", %62, %63, %64, %65, %66, %67, %68, %69"
#define NAMES_72 NAMES_64 ", %70, %71, %72, %73, %74, %75, %76, %77"
#define NAMES_80 NAMES_72 ", %78, %79, %80, %81, %82, %83, %84, %85"
#define NAMES_88 NAMES_80 ", %86, %87, %88, %89, %90, %91, %92, %93"
#define NAMES_96 NAMES_88 ", %94, %95, %96, %97, %98, %99, %100, %101"
#define NAMES_104 NAMES_96 ", %102, %103, %104, %105, %106, %107, %108, %109"
#define NAMES_112 NAMES_104 ", %110, %111, %112, %113, %114, %115, %116, %117"
#define NAMES_120 NAMES_112 ", %118, %119, %120, %121, %122, %123, %124, %125"
#define NAMES_128 NAMES_120 ", %126, %127, %128, %129, %130, %131, %132, %133"
#define REGISTERS_8 ACC8(0)
#define REGISTERS_16 REGISTERS_8, ACC8(8)
#define REGISTERS_24 REGISTERS_16, ACC8(16)
#define REGISTERS_32 REGISTERS_24, ACC8(24)
#define REGISTERS_40 REGISTERS_32, ACC8(32)
#define REGISTERS_48 REGISTERS_40, ACC8(40)
#define REGISTERS_56 REGISTERS_48, ACC8(48)
#define REGISTERS_64 REGISTERS_56, ACC8(56)
#define REGISTERS_72 REGISTERS_64, ACC8(64)
#define REGISTERS_80 REGISTERS_72, ACC8(72)
#define REGISTERS_88 REGISTERS_80, ACC8(80)
#define REGISTERS_96 REGISTERS_88, ACC8(88)
#define REGISTERS_104 REGISTERS_96, ACC8(96)
#define REGISTERS_112 REGISTERS_104, ACC8(104)
#define REGISTERS_120 REGISTERS_112, ACC8(112)
#define REGISTERS_128 REGISTERS_120, ACC8(120)

// `types`: steps and the types of d, a and b; `more`: signs and orientation, which integers have no choice of.
#define MMA(types, more)                                                                                                     \
    asm volatile("{\n .reg .pred add;\n setp.ne.b32 add, %5, 0;\n"                                                            \
                 " wgmma.mma_async.sync.aligned.m64n" TEXT(TOKENS) types " {" JOIN(NAMES_, ACCUMULATORS) "},"                   \
                 " {%0, %1, %2, %3}, %4, add" more ";\n}"                                                                     \
                 : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]), "+l"(b), "+r"(add), JOIN(REGISTERS_, ACCUMULATORS))
#define TEXT_(number) #number
#define TEXT(number) TEXT_(number)

// Asynchronous: a, b and d belong to the tensor cores until a wait says otherwise.
#if INT8
#define IN_REGISTER "+r"
FN void mma(int (&d)[ACCUMULATORS], u32 (&a)[4], u64 b, int add) { MMA("k32.s32.s8.s8", ""); }
// Products of 16-bit numbers, added to floats in the registers of the integers that they were: a second array would not share them.
FN void mma_floats(int (&d)[ACCUMULATORS], u32 (&a)[4], u64 b, int add) {
#else
#define IN_REGISTER "+f"
FN void mma(float (&d)[ACCUMULATORS], u32 (&a)[4], u64 b, int add) {
#endif
    if constexpr (ACTIVATION == BF16) MMA("k16.f32.bf16.bf16", ", 1, 1, 0");
    else MMA("k16.f32.f16.f16", ", 1, 1, 0");
}

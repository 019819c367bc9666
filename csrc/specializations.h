// The guidance rules that pipelines spend their steps in, as constants: each gets a kernel of its own, in which the
// code below is unrolled and its registers are registers. Any other program runs in the general kernel.
//
// The code is what python/cfg_parallel/lowering.py makes of the rule's ops; tests/test_program.py compares the two.
#pragma once

#include <array>
#include <cstddef>

#include "program.h"

namespace cfg_parallel {

constexpr int kMaxStaticInputs = 4;
constexpr int kMaxStaticInstructions = 12;

struct StaticProgram {
  const char* name() const {
    constexpr const char* kNames[] = {"cfg", "cfg_cond", "instruct_pix2pix", "norm", "cfg_euler", "norm_euler"};
    return kNames[static_cast<int>(rule)];
  }

  enum class Rule : int { kCfg, kCfgCond, kInstructPix2Pix, kNorm, kCfgEuler, kNormEuler };
  Rule rule{};
  int num_inputs = 0;
  int num_instructions = 0;
  DType inputs[kMaxStaticInputs]{};
  DType output{};
  Instruction code[kMaxStaticInstructions]{};
  std::uint8_t store = 0;

  // Whether there is a kernel that waits for a peer too: for what pipelines do with most models, to keep the build
  // short.
  constexpr bool waits() const {
    return output != DType::kFloat32 && rule != Rule::kCfgCond && rule != Rule::kInstructPix2Pix;
  }

  constexpr void input(DType dtype) { inputs[num_inputs++] = dtype; }
  constexpr void emit(Op op, int dst, int a, int b, DType round) {
    code[num_instructions++] = {
        op, static_cast<std::uint8_t>(dst), static_cast<std::uint8_t>(a), static_cast<std::uint8_t>(b), 0, round};
  }
};

using Rule = StaticProgram::Rule;

// `type` of the predictions. Exact rounds to it after every op; fused rounds when the result is stored.
constexpr StaticProgram cfg(DType type, DType round) {  // n + s * (p - n); registers n, p
  StaticProgram program{.rule = Rule::kCfg, .output = type};
  program.input(type);
  program.input(type);
  program.emit(Op::kSub, 1, 1, 0, round);
  program.emit(Op::kMul, 1, 1, kScalar, round);
  program.emit(Op::kAdd, 0, 0, 1, round);
  return program;
}

constexpr StaticProgram cfg_cond(DType type, DType round) {  // p + s * (p - n); registers p, n
  StaticProgram program = cfg(type, round);
  program.rule = Rule::kCfgCond;
  program.code[0] = {Op::kSub, 1, 0, 1, 0, round};
  return program;
}

constexpr StaticProgram instruct_pix2pix(DType type, DType round) {  // n + s * (t - i) + r * (i - n); registers n, t, i
  StaticProgram program{.rule = Rule::kInstructPix2Pix, .output = type};
  for (int k = 0; k < 3; ++k) program.input(type);
  program.emit(Op::kSub, 1, 1, 2, round);
  program.emit(Op::kMul, 1, 1, kScalar, round);
  program.emit(Op::kAdd, 1, 0, 1, round);
  program.emit(Op::kSub, 0, 2, 0, round);
  program.emit(Op::kMul, 0, 0, kScalar + 1, round);
  program.emit(Op::kAdd, 0, 1, 0, round);
  return program;
}

// Guidance of registers n and p into register n, with a free register; with the norm of p kept when `with_norm`.
constexpr void guide(StaticProgram& program, int n, int p, int free, bool with_norm, DType round) {
  const int difference = with_norm ? free : p;
  program.emit(Op::kSub, difference, p, n, round);
  program.emit(Op::kMul, difference, difference, kScalar, round);
  program.emit(Op::kAdd, n, n, difference, round);
  if (!with_norm) return;
  program.emit(Op::kNorm, p, p, 0, round);
  program.emit(Op::kNorm, free, n, 0, round);
  program.emit(Op::kDiv, p, p, free, round);
  program.emit(Op::kMul, n, n, p, round);
}

constexpr StaticProgram norm(DType type, DType round) {  // g = cfg; g * |p| / |g|; registers n, p
  StaticProgram program{.rule = Rule::kNorm, .output = type};
  program.input(type);
  program.input(type);
  guide(program, 0, 1, 2, true, round);
  return program;
}

// sample + dt * guidance, dt a tensor without dimensions; registers sample, dt, n, p.
constexpr StaticProgram euler(DType type, DType sample, bool with_norm, DType round) {
  StaticProgram program{.rule = with_norm ? Rule::kNormEuler : Rule::kCfgEuler, .output = type};
  program.input(sample);
  program.input(DType::kFloat32);
  program.input(type);
  program.input(type);
  const bool rounds = round != DType::kFloat32;
  if (rounds) program.emit(Op::kRound, 1, 1, 0, round);
  guide(program, 2, 3, 4, with_norm, round);
  program.emit(Op::kMul, 1, 1, 2, round);
  program.emit(Op::kAdd, 0, 0, 1, DType::kFloat32);
  if (rounds) program.emit(Op::kRound, 0, 0, 0, round);
  return program;
}

constexpr auto kHalfPrograms = [] {
  std::array<StaticProgram, 32> all{};
  std::size_t count = 0;
  for (const DType type : {DType::kFloat16, DType::kBFloat16}) {
    for (const DType round : {type, DType::kFloat32}) {
      all[count++] = cfg(type, round);
      all[count++] = cfg_cond(type, round);
      all[count++] = instruct_pix2pix(type, round);
      all[count++] = norm(type, round);
      for (const bool with_norm : {false, true}) {
        all[count++] = euler(type, DType::kFloat32, with_norm, round);
        all[count++] = euler(type, type, with_norm, round);
      }
    }
  }
  return all;
}();

constexpr auto kFloatPrograms = [] {
  constexpr DType kType = DType::kFloat32;
  return std::array<StaticProgram, 6>{cfg(kType, kType),
                                      cfg_cond(kType, kType),
                                      instruct_pix2pix(kType, kType),
                                      norm(kType, kType),
                                      euler(kType, kType, false, kType),
                                      euler(kType, kType, true, kType)};
}();

constexpr auto kStaticPrograms = [] {
  std::array<StaticProgram, kHalfPrograms.size() + kFloatPrograms.size()> all{};
  for (std::size_t i = 0; i < kHalfPrograms.size(); ++i) all[i] = kHalfPrograms[i];
  for (std::size_t i = 0; i < kFloatPrograms.size(); ++i) all[kHalfPrograms.size() + i] = kFloatPrograms[i];
  return all;
}();

}  // namespace cfg_parallel

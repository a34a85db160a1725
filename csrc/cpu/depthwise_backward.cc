// The whole of backward for depthwise convolutions, in two passes.
//
// The first reads (dy, z) and reduces, as the reduce stage does. The second walks down each strip of columns: a few
// lines of the gradient of z are computed into a ring of lines, from which the gradients by the filters (with the lines
// of the inputs, in a ring of their own) and by the inputs follow at once. So the gradient of z never reaches memory,
// nor does z where it is computed again. Lines and columns at the seams of regions are computed by both neighbours.
//
// Regions and ranges of regions follow from the problem alone. A range has sums of its own, added in their order.
#include <algorithm>
#include <vector>

#include "compute_type.h"
#include "depthwise.h"
#include "depthwise_geometry.h"
#include "gradient_blocks.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

constexpr int64_t kMaxRingBytes = 512 << 10;  // both rings of a task, in L2 beside what streams through it

template <class C>
class DepthwiseBackward {
 public:
  // With empty buffers and a null scratch it only measures.
  DepthwiseBackward(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device,
                    const BackwardBuffers& buffers, const void* conv_out, Arena* arena)
      : p_(p),
        b_(buffers),
        k_(compute_kernels<C>(set)),
        storage_(storage_of<C>(set, p.dtype)),
        lines_{p.in_height, p.out_height, p.stride_height, p.pad_top, p.dilation_height, p.filter_height},
        columns_{p.in_width, p.out_width, p.stride_width, p.pad_left, p.dilation_width, p.filter_width},
        regions_{p.batch, lines_, columns_},
        panels_{p.out_channels, p.group_out()},
        inputs_(buffers.inputs, storage_, input_grid(p)),
        d_inputs_(buffers.d_inputs, storage_, input_grid(p)),
        stager_(k_, inputs_, panels_),
        in_place_(slides_in_place(k_, inputs_, forward_windows(p), p.group_out())),
        depthwise_(in_place_ && !inputs_.direct() ? inputs_.in_place_kernels().depthwise : k_.depthwise),
        outer_(in_place_ && !inputs_.direct() ? inputs_.in_place_kernels().depthwise_outer : k_.depthwise_outer),
        convolution_(k_, storage_, inputs_, forward_windows(p), {p.groups, 1, p.group_out()}),
        blocks_(set, p, buffers, saved_image<C>(set, p, p.saved, has_conv_out(p) ? conv_out : nullptr),
                has_conv_out(p) ? GradientBlocks<C>::blocks(p) : convolution_.blocks(), device.threads, arena,
                has_conv_out(p)) {
    make_phases();
    if (!has_conv_out(p)) convolution_scratch_ = convolution_.carve(arena, device.threads);
    sums_ = arena->take<C>(regions_.ranges() * panels_.count() * panel_elements());
    transposed_ = arena->take<C>(panels_.count() * panel_elements());
    zeros_ = arena->take<C>(zero_elements());
    for (int w = 0; w < device.threads; ++w) workers_.push_back(carve(arena));
  }

  void run(ParallelFor* parallel) const {
    has_conv_out(p_) ? blocks_.reduce(parallel) : reduce_recomputed(parallel);
    if (!b_.d_inputs && !b_.d_filters && !b_.d_residual) return;
    pack_panels(b_.filters, transposed_taps_, storage_, panels_, transposed_);
    std::fill_n(zeros_, zero_elements(), C(0));
    const int64_t shares = ceil_div(panels_.count(), share());
    parallel->run(regions_.ranges() * shares, [&](int64_t task, int worker) {
      const int64_t first = task % shares * share();
      run_range(task / shares, {first, std::min(first + share(), panels_.count())}, workers_[worker], worker);
    });
    if (b_.d_filters) parallel->run(panels_.count(), [this](int64_t panel, int) { finish(panel); });
  }

 private:
  struct PhaseLines {
    PanelLines lines;
    int64_t first_tap, line, column;  // line, column: the first, of the step's inputs
  };

  struct Worker {
    LineRing<C> inputs, gradients;    // of the inputs unless they are read in place
    const void **windows, **sources;  // [lines][taps]
    const C** gradient_lines;         // [lines]
    PhaseLines* phases;
    C *z, *tile, *stage;
  };

  int64_t panel_elements() const { return p_.taps() * kDepthwisePanel; }
  int64_t zero_elements() const { return in_place_ ? LinesInPlace<C>::zero_elements(inputs_.grid()) : 0; }
  // Panels of a task.
  int64_t share() const {
    const int64_t inputs = in_place_ ? 0 : (regions_.input_ring_lines() + 1) * regions_.input_ring_pixels();
    const int64_t pixels = inputs + (regions_.gradient_ring_lines() + 1) * regions_.gradient_ring_pixels();
    const int64_t bytes = pixels * kDepthwisePanel * static_cast<int64_t>(sizeof(C));
    return panels_.share(std::min(kMaxRingBytes, k_.l2 / 2) / std::max<int64_t>(1, bytes));
  }

  Worker carve(Arena* arena) const {
    const int64_t group = regions_.group_lines(), inputs = group * lines_.stride;
    const int64_t owned_columns = regions_.owned_columns();
    Worker w;
    if (!in_place_)
      w.inputs = LineRing<C>::carve(arena, share(), regions_.input_ring_lines(), regions_.input_ring_pixels());
    w.gradients = LineRing<C>::carve(arena, share(), regions_.gradient_ring_lines(), regions_.gradient_ring_pixels());
    w.windows = arena->take<const void*>(group * p_.taps());
    w.gradient_lines = arena->take<const C*>(group);
    w.sources = arena->take<const void*>(inputs * p_.taps());
    w.phases = arena->take<PhaseLines>(static_cast<int64_t>(phases_.size()));
    w.z = arena->take<C>(has_conv_out(p_) ? 0 : regions_.gradient_ring_pixels() * kDepthwisePanel);
    w.tile = arena->take<C>(inputs * owned_columns * kDepthwisePanel);
    w.stage = arena->take<C>(stager_.scratch_elements(regions_.input_ring_pixels()));
    return w;
  }

  void make_phases() {
    int64_t first_tap = 0;
    for (int64_t line = 0; line < lines_.stride; ++line)
      for (int64_t column = 0; column < columns_.stride; ++column) {
        phases_.push_back({line, column, phase_taps(lines_, line), phase_taps(columns_, column), first_tap});
        first_tap += phases_.back().taps();
        for (int64_t row : phases_.back().rows)
          for (int64_t col : phases_.back().cols)
            transposed_taps_.push_back((row * p_.filter_width + col) * p_.out_channels);
      }
  }

  // The first pass where z is not there: a tile of it at a time.
  void reduce_recomputed(ParallelFor* parallel) const {
    blocks_.channels().prepare();
    FilterLayout filters{b_.filters, {}, p_.group_out(), p_.out_channels, 1};
    for (int64_t t = 0; t < p_.taps(); ++t) filters.tap_offset.push_back(t * p_.out_channels);
    const auto reduce = [this](const Tile<C>& t) {
      GradientBlock<C> g = blocks_.read(t.first, t.rows, t.channel, t.cols, t.worker);
      g.z = t.data, g.ld_z = t.ld;
      blocks_.reduce_block(g, t.block, t.channel);
    };
    convolution_.run(filters, convolution_scratch_, parallel, {reduce, nullptr});
    blocks_.channels().finish(parallel);
  }

  void run_range(int64_t range, const Span& panels, const Worker& w, int worker) const {
    C* sums = sums_ + (range * panels_.count() + panels.begin) * panel_elements();
    std::fill(sums, sums + panels.size() * panel_elements(), C(0));
    clear(w.gradients);
    if (!in_place_) w.inputs.zero_last_line();
    const Span share = part(range, regions_.ranges(), regions_.count());
    for (int64_t index = share.begin; index < share.end; ++index)
      run_region(regions_.region(index, b_.d_inputs != nullptr), panels, w, worker, sums);
    k_.end_streaming();
  }

  // The line that stays zeros; and channels beyond a panel's last, which stay so too.
  void clear(const LineRing<C>& ring) const {
    const bool whole = panels_.width() == kDepthwisePanel && panels_.channels % kDepthwisePanel == 0;
    if (whole) return ring.zero_last_line();
    std::fill_n(ring.data, ring.elements(), C(0));
  }

  void run_region(const Region& r, const Span& panels, const Worker& w, int worker, C* sums) const {
    Progress done{r.lines.inside.begin, r.lines.inputs.begin, 0};
    while (done.next < r.lines.inside.end || done.ready < r.lines.inputs.end) {
      const Step step = regions_.next_step(r, done);
      const bool multiplies = step.owned && b_.d_filters;
      if (multiplies || !has_conv_out(p_)) read_inputs(r, step, panels, w, &done);
      for (int64_t i = step.gradients.begin; i < step.gradients.end; ++i)
        w.gradient_lines[i - step.gradients.begin] = w.gradients.line(i);
      point_phases(r, step, w);
      for (int64_t i = step.gradients.begin; i < step.gradients.end; ++i) gradient_of_z(r, step, i, panels, w, worker);
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        const int64_t slot = panel - panels.begin;
        if (multiplies) add_products(r, step, panels, panel, w, sums + slot * panel_elements());
        if (step.inputs.size() > 0) write_inputs(r, step, panels, panel, w);
      }
      done.next = step.gradients.end, done.ready = step.inputs.end;
    }
  }

  // Points windows[line][tap] at the inputs of the step's windows, which are staged first if need be.
  void read_inputs(const Region& r, const Step& step, const Span& panels, const Worker& w, Progress* done) const {
    const int64_t first = step.gradients.begin * lines_.stride - lines_.pad;
    const int64_t end = (step.gradients.end - 1) * lines_.stride - lines_.pad + lines_.reach() + 1;
    for (int64_t h = std::max(done->staged, first); h < std::min(end, p_.in_height) && !in_place_; ++h)
      stager_.stage(r.image, h, r.columns_read, panels, w.stage, w.inputs);
    done->staged = std::max(done->staged, end);
    const LinesInPlace<C> lines{inputs_, zeros_};
    const void** window = w.windows;
    for (int64_t i = step.gradients.begin; i < step.gradients.end; ++i)
      for (int64_t t = 0; t < p_.taps(); ++t) {
        const int64_t h = i * lines_.stride - lines_.pad + t / p_.filter_width * lines_.dilation;
        const int64_t column = t % p_.filter_width * columns_.dilation;
        if (in_place_) {
          *window++ = lines.at(r.image, h, r.columns_read.begin + column);
        } else {
          const C* line = h >= 0 && h < p_.in_height ? w.inputs.line(h) : w.inputs.zeros();
          *window++ = line + column * w.inputs.ld();
        }
      }
  }

  // Of columns `outputs`, for a panel that is at `slot` of a ring.
  PanelLines windows(const Region& r, const Worker& w, int64_t lines, const Span& outputs, int64_t panel,
                     int64_t slot) const {
    const int64_t ld = in_place_ ? inputs_.ld() : w.inputs.ld(), step = columns_.stride * ld;
    const int64_t channel = in_place_ ? panels_.channel(panel) : slot * kDepthwisePanel;
    PanelLines in{w.windows,
                  lines,
                  outputs.size(),
                  p_.taps(),
                  p_.filter_width,
                  columns_.dilation * ld,
                  step,
                  channel + (outputs.begin - r.columns.inside.begin) * step,
                  panels_.cols(panel)};
    in.left = in_place_ && outputs.begin * columns_.stride < columns_.pad;
    in.right = in_place_ && (outputs.end - 1) * columns_.stride - columns_.pad + columns_.taps > p_.in_width;
    return in;
  }

  // Line i of the gradient of z into the ring: all channels at once where they are consecutive there as in memory.
  void gradient_of_z(const Region& r, const Step& step, int64_t i, const Span& panels, const Worker& w,
                     int worker) const {
    const Span &all = r.columns.gradients, &inside = r.columns.inside;
    const int64_t ld = w.gradients.ld();
    C *line = w.gradients.line(i), *first = line + (inside.begin - all.begin) * ld, *last = first + inside.size() * ld;
    std::fill(line, first, C(0));
    std::fill(last, line + all.size() * ld, C(0));
    if (has_conv_out(p_) && blocks_.any_size() && panels_.width() == kDepthwisePanel)
      return gradient_of_z(r, step, i, panels, {first, ld}, nullptr, worker);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel, first += kDepthwisePanel) {
      if (!has_conv_out(p_)) recompute(r, i - step.gradients.begin, panel, panel - panels.begin, w);
      gradient_of_z(r, step, i, {panel, panel + 1}, {first, ld}, w.z, worker);
    }
  }

  // A line of z, for a panel.
  void recompute(const Region& r, int64_t line, int64_t panel, int64_t slot, const Worker& w) const {
    PanelLines in = windows(r, w, 1, r.columns.inside, panel, slot);
    in.sources += line * p_.taps();
    depthwise_(in, convolution_scratch_.filters + panel * panel_elements(), {w.z, 0, kDepthwisePanel, false});
  }

  // Of some panels. z: recomputed, where it is not in memory.
  void gradient_of_z(const Region& r, const Step& step, int64_t i, const Span& panels, const Block<C>& dz, const C* z,
                     int worker) const {
    const Span &inside = r.columns.inside, &owned = r.columns.outputs;
    const int64_t channel = panels_.channel(panels.begin);
    const int64_t cols = panels_.channel(panels.end - 1) + panels_.cols(panels.end - 1) - channel;
    for (const Span& span : {Span{inside.begin, owned.begin}, owned, Span{owned.end, inside.end}}) {
      if (span.size() == 0) continue;
      const int64_t pixel = (r.image * p_.out_height + i) * p_.out_width + span.begin, at = span.begin - inside.begin;
      GradientBlock<C> g = blocks_.read(pixel, span.size(), channel, cols, worker);
      if (!has_conv_out(p_)) g.z = z + at * kDepthwisePanel, g.ld_z = kDepthwisePanel;
      blocks_.apply(g, pixel, channel, {dz.data + at * dz.ld, dz.ld}, worker,
                    step.owned && span.begin == owned.begin && span.end == owned.end);
    }
  }

  // The step's part of the gradient by the filters. Asks for the inputs of the next step.
  void add_products(const Region& r, const Step& step, const Span& panels, int64_t panel, const Worker& w,
                    C* sums) const {
    const Span& owned = r.columns.outputs;
    const int64_t ld = w.gradients.ld(), slot = panel - panels.begin;
    PanelLines in = windows(r, w, step.gradients.size(), owned, panel, slot);
    if (in_place_ && panels.size() == panels_.count()) {
      const int64_t end = step.gradients.end * lines_.stride - lines_.pad + lines_.reach();
      const int64_t line = r.image * p_.in_height + std::clamp<int64_t>(end, 0, p_.in_height);
      const int64_t first = line * p_.in_width + owned.begin * columns_.stride;
      const int64_t behind = in.lines * in.columns * columns_.stride * columns_.stride * panels_.channel(panel);
      in.ahead = inputs_.address(first, 0) + behind * inputs_.element_bytes();
    }
    outer_(in, w.gradient_lines, slot * kDepthwisePanel + (owned.begin - r.columns.gradients.begin) * ld, ld, sums);
  }

  // For each phase the lines of step.inputs, and where they read the gradient of z.
  void point_phases(const Region& r, const Step& step, const Worker& w) const {
    const void** source = w.sources;
    PhaseLines* to = w.phases;
    for (const Phase& phase : phases_) {
      const auto first_of = [](const Span& span, int64_t phase, const Axis& axis) {
        return span.begin + ((phase - span.begin - axis.pad) % axis.stride + axis.stride) % axis.stride;
      };
      const int64_t h0 = first_of(step.inputs, phase.line, lines_);
      const int64_t w0 = first_of(r.columns.inputs, phase.column, columns_);
      const int64_t lines = ceil_div(std::max<int64_t>(0, step.inputs.end - h0), lines_.stride);
      const int64_t columns = ceil_div(std::max<int64_t>(0, r.columns.inputs.end - w0), columns_.stride);
      const int64_t row_taps = static_cast<int64_t>(phase.cols.size());
      const int64_t tap_step = row_taps > 1 ? (phase.cols[0] - phase.cols[1]) * columns_.dilation / columns_.stride : 0;
      *to++ = {{source, lines, columns, phase.taps(), row_taps, tap_step * w.gradients.ld(), w.gradients.ld(), 0, 0},
               phase.first_tap,
               h0 - step.inputs.begin,
               w0 - r.columns.inputs.begin};
      for (int64_t l = 0; l < lines; ++l)
        source = point_line(r, phase, h0 + l * lines_.stride, w0, w.gradients, source);
    }
  }

  const void** point_line(const Region& r, const Phase& phase, int64_t h, int64_t w0, const LineRing<C>& ring,
                          const void** source) const {
    for (int64_t row : phase.rows) {
      const int64_t i = floor_div(h + lines_.pad - row * lines_.dilation, lines_.stride);
      const C* line = i >= 0 && i < p_.out_height ? ring.line(i) : ring.zeros();
      for (int64_t col : phase.cols) {
        const int64_t j = floor_div(w0 + columns_.pad - col * columns_.dilation, columns_.stride);
        *source++ = line + (j - r.columns.gradients.begin) * ring.ld();
      }
    }
    return source;
  }

  // The lines of the gradient by the inputs that the step completes, for a panel: into memory if that can be, else from
  // a tile.
  void write_inputs(const Region& r, const Step& step, const Span& panels, int64_t panel, const Worker& w) const {
    const Span& columns = r.columns.inputs;
    const char* ahead = nullptr;  // the next step's dy
    if (in_place_ && panels.size() == panels_.count())
      ahead = static_cast<const char*>(b_.output_gradient) +
              ((r.image * p_.out_height + step.gradients.end) * p_.out_width + r.columns.inside.begin) *
                  p_.out_channels * storage_.element_bytes;
    const int64_t m = panels_.multiplier, cols = panels_.cols(panel) / m, channel = panels_.channel(panel) / m;
    const int64_t first = (r.image * p_.in_height + step.inputs.begin) * p_.in_width + columns.begin;
    if (m == 1 && d_inputs_.direct() && cols % (k_.panel / 2) == 0) {
      const Block<C> to = d_inputs_.target(first, channel, {});
      return write_inputs(panel, panel - panels.begin, w, ahead,
                          {to.data, p_.in_width * to.ld, to.ld, d_inputs_.streams(channel, cols)});
    }
    const int64_t line = columns.size() * kDepthwisePanel;
    write_inputs(panel, panel - panels.begin, w, ahead, {w.tile, line, kDepthwisePanel, false});
    if (m > 1) k_.depthwise_fold(w.tile, step.inputs.size() * columns.size(), cols, m);
    for (int64_t i = 0; i < step.inputs.size(); ++i)
      d_inputs_.write(first + i * p_.in_width, columns.size(), channel, cols, {w.tile + i * line, kDepthwisePanel});
  }

  // Phase by phase, into lines and columns of stride 1.
  void write_inputs(int64_t panel, int64_t slot, const Worker& w, const char* ahead, const PanelTarget<C>& to) const {
    for (size_t i = 0; i < phases_.size(); ++i) {
      const PhaseLines& phase = w.phases[i];
      PanelLines in = phase.lines;
      in.offset = slot * kDepthwisePanel, in.cols = panels_.cols(panel);
      if (ahead) in.ahead = ahead + in.lines * in.columns * panels_.channel(panel) * storage_.element_bytes;
      k_.depthwise(in, transposed_ + panel * panel_elements() + phase.first_tap * kDepthwisePanel,
                   {to.data + phase.line * to.ld_line + phase.column * to.ld_column, lines_.stride * to.ld_line,
                    columns_.stride * to.ld_column, to.stream});
    }
  }

  // Adds the ranges' sums of a panel and stores them.
  void finish(int64_t panel) const {
    C* sums = sums_ + panel * panel_elements();
    for (int64_t range = 1; range < regions_.ranges(); ++range)
      for (int64_t i = 0; i < panel_elements(); ++i) sums[i] += sums[range * panels_.count() * panel_elements() + i];
    char* to = static_cast<char*>(b_.d_filters) + panels_.channel(panel) * storage_.element_bytes;
    storage_.kernels.store(sums, kDepthwisePanel, p_.taps(), panels_.cols(panel), to, p_.out_channels, 1, false);
  }

  const ConvBnParams& p_;
  BackwardBuffers b_;
  const ComputeKernels<C>& k_;
  Storage<C> storage_;
  Axis lines_, columns_;
  DepthwiseRegions regions_;
  DepthwisePanels panels_;
  Image<C> inputs_, d_inputs_;
  PanelStager<C> stager_;
  bool in_place_;
  // Of the inputs.
  decltype(ComputeKernels<C>::depthwise) depthwise_;
  decltype(ComputeKernels<C>::depthwise_outer) outer_;
  DepthwiseConvolution<C> convolution_;
  GradientBlocks<C> blocks_;
  std::vector<Phase> phases_;
  std::vector<int64_t> transposed_taps_;  // of the filters, in the order of the phases
  typename DepthwiseConvolution<C>::Scratch convolution_scratch_{};
  C *sums_, *transposed_;  // [ranges][panels][taps][kDepthwisePanel], [panels][taps][kDepthwisePanel]
  C* zeros_;               // a line, if lines are read in place
  std::vector<Worker> workers_;
};

}  // namespace

size_t backward_depthwise_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype, [&](auto c) {
    Arena arena;
    DepthwiseBackward<decltype(c)>(set, p, device, {}, nullptr, &arena);
    return arena.used();
  });
}

Status run_backward_depthwise(const KernelSet& set, const StageCall& call) {
  with_compute_type(call.params.dtype, [&](auto c) {
    Arena arena(call.scratch);
    DepthwiseBackward<decltype(c)>(set, call.params, call.device, *call.backward, call.conv_out, &arena)
        .run(call.parallel);
  });
  return Status{};
}

}  // namespace fusedconvbn

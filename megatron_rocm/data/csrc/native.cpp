// What numpy is slow at when tens of millions of documents are put in order. ../native.py checks the arguments, and has
// numpy's way to the same bits for machines where this was not compiled.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Far enough for main memory to answer meanwhile, and no more than a core can have under way.
constexpr int64_t kAhead = 32;

template <typename T>
void prefetch(const T* base, int64_t index) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + index * sizeof(T)), 1);
}

// MT19937 (Matsumoto and Nishimura, 1998) over the state that numpy keeps: 624 words, and which of them is next. Words
// are made when the first of them is asked for, as numpy does, so that the state left behind is numpy's too.
class Twister {
 public:
  static constexpr int kWords = 624;

  Twister(uint32_t* key, int position) : key_(key), position_(position) { temper(); }

  // Words not drawn yet, at least one. `drew(n)` takes the first n of them.
  const uint32_t* words() {
    if (position_ == kWords) {
      generate();
      position_ = 0;
      temper();
    }
    return words_.data() + position_;
  }
  int left() const { return kWords - position_; }
  void drew(int count) { position_ += count; }
  int position() const { return position_; }

 private:
  static constexpr int kMiddle = 397;

  static uint32_t twist(uint32_t high, uint32_t low, uint32_t middle) {
    const uint32_t joined = (high & 0x80000000u) | (low & 0x7fffffffu);
    return middle ^ (joined >> 1) ^ (-(low & 1u) & 0x9908b0dfu);
  }

  void generate() {
    for (int i = 0; i < kWords - kMiddle; ++i) key_[i] = twist(key_[i], key_[i + 1], key_[i + kMiddle]);
    for (int i = kWords - kMiddle; i < kWords - 1; ++i) {
      key_[i] = twist(key_[i], key_[i + 1], key_[i + kMiddle - kWords]);
    }
    key_[kWords - 1] = twist(key_[kWords - 1], key_[0], key_[kMiddle - 1]);
  }

  void temper() {
    for (int i = 0; i < kWords; ++i) {
      uint32_t y = key_[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680u;
      y ^= (y << 15) & 0xefc60000u;
      words_[i] = y ^ (y >> 18);
    }
  }

  uint32_t* key_;
  int position_;
  std::array<uint32_t, kWords> words_;
};

// numpy's legacy shuffle (mtrand.pyx _shuffle_raw, distributions.c random_interval): from the last item down, item i
// changes places with one at or below it, drawn as the first word that is not above i once masked to i's bits. The
// draws don't depend on the items: they are made a block ahead, and memory is asked for them before they are needed.
template <typename Item>
void shuffle_items(Item* items, int64_t size, Twister& random) {
  constexpr int64_t kBlock = 1024;
  std::array<uint32_t, kBlock + kAhead> partner{};
  for (int64_t last = size - 1; last > 0;) {
    uint32_t mask = static_cast<uint32_t>(last);
    for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
    const int64_t wanted = std::min(kBlock, last - static_cast<int64_t>(mask >> 1));  // items that share the mask
    for (int64_t found = 0; found < wanted;) {
      const uint32_t* words = random.words();
      const int left = random.left();
      int used = 0;
      while (used < left && found < wanted) {
        const uint32_t value = words[used++] & mask;
        partner[found] = value;  // overwritten by the next one where it is above
        found += value <= static_cast<uint32_t>(last - found);
      }
      random.drew(used);
    }
    for (int64_t i = 0; i < kAhead; ++i) prefetch(items, partner[i]);
    for (int64_t i = 0; i < wanted; ++i) {
      prefetch(items, partner[i + kAhead]);
      std::swap(items[last - i], items[partner[i]]);
    }
    last -= wanted;
  }
}

template <typename Item>
int shuffle(Array<Item> items, Array<uint32_t> key, int position) {
  if (items.ndim() != 1 || items.size() > (int64_t{1} << 32) || key.size() != Twister::kWords || position < 0 ||
      position > Twister::kWords) {
    throw std::invalid_argument("shuffle: not a row of at most 2**32 items and a state of MT19937");
  }
  Item* data = items.mutable_data();
  const int64_t size = items.size();
  Twister random(key.mutable_data(), position);
  py::gil_scoped_release release;
  shuffle_items(data, size, random);
  return random.position();
}

// Fills `out` [samples + 1, 2] with the place, and the offset in tokens from its beginning, of every `seq_length`-th
// token, beginning with the first place. `length_of(place)` is asked for in order.
template <typename Out, typename LengthOf>
void fill_samples(Array<Out>& out, int64_t places, int64_t seq_length, LengthOf length_of) {
  if (out.ndim() != 2 || out.shape(0) < 1 || out.shape(1) != 2 || seq_length < 1) {
    throw std::invalid_argument("sample_index: out must be [samples + 1, 2], seq_length above 0");
  }
  Out* row = out.mutable_data();
  Out* const end = row + out.size();
  {
    py::gil_scoped_release release;
    *row++ = 0;
    *row++ = 0;
    int64_t before = 0, boundary = seq_length;  // in tokens
    for (int64_t place = 0; place < places && row != end; ++place) {
      const int64_t after = before + length_of(place);
      for (; boundary < after && row != end; boundary += seq_length) {
        *row++ = static_cast<Out>(place);
        *row++ = static_cast<Out>(boundary - before);
      }
      before = after;
    }
  }
  if (row != end) throw std::invalid_argument("sample_index: the documents hold fewer tokens than was said");
}

// Of documents in the order of `lengths`, a row of any stride.
template <typename Out>
void sample_index(py::array_t<int32_t> lengths, int64_t seq_length, Array<Out> out) {
  const auto length = lengths.unchecked<1>();
  fill_samples(out, lengths.size(), seq_length, [&](int64_t place) { return length(place); });
}

// Of the documents of those numbers.
template <typename Out>
void sample_index_of(Array<int32_t> lengths, Array<int32_t> documents, int64_t seq_length, Array<Out> out) {
  const int32_t* length = lengths.data();
  const int32_t* document = documents.data();
  const int64_t known = lengths.size(), last = documents.size() - 1;
  fill_samples(out, documents.size(), seq_length, [=](int64_t place) {
    prefetch(length, document[std::min(place + kAhead, last)]);
    const int64_t id = document[place];
    if (id < 0 || id >= known) throw std::out_of_range("sample_index: a document has no length");
    return length[id];
  });
}

// Best fit: each length, in the order given, goes to the bin with the least room that it fits in, of several the one
// used last; where there is none, to a new bin. Returns the number of bins.
int64_t pack(Array<int64_t> lengths, int64_t capacity, Array<int64_t> bins) {
  if (bins.size() != lengths.size()) throw std::invalid_argument("pack: a bin for each length");
  const int64_t* length = lengths.data();
  int64_t* bin = bins.mutable_data();
  const int64_t count = lengths.size();
  py::gil_scoped_release release;
  std::map<int64_t, std::vector<int64_t>> by_room;
  int64_t opened = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t room = capacity;
    const auto best = by_room.lower_bound(length[i]);
    if (best == by_room.end()) {
      bin[i] = opened++;
    } else {
      room = best->first;
      bin[i] = best->second.back();
      best->second.pop_back();
      if (best->second.empty()) by_room.erase(best);
    }
    by_room[room - length[i]].push_back(bin[i]);
  }
  return opened;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  // No conversions: a converted copy would be changed instead of the caller's array.
  const auto strict = [](const char* name) { return py::arg(name).noconvert(); };
  module.def("shuffle", &shuffle<uint32_t>, strict("items"), strict("key"), py::arg("position"));
  module.def("shuffle", &shuffle<uint64_t>, strict("items"), strict("key"), py::arg("position"));
  module.def("sample_index", &sample_index<int32_t>, strict("lengths"), py::arg("seq_length"), strict("out"));
  module.def("sample_index", &sample_index<int64_t>, strict("lengths"), py::arg("seq_length"), strict("out"));
  module.def("sample_index", &sample_index_of<int32_t>, strict("lengths"), strict("documents"), py::arg("seq_length"),
             strict("out"));
  module.def("sample_index", &sample_index_of<int64_t>, strict("lengths"), strict("documents"), py::arg("seq_length"),
             strict("out"));
  module.def("pack", &pack, strict("lengths"), py::arg("capacity"), strict("bins"));
}

// A line of the file is a product, its engine, configuration and splits, separated by tabs; the first line names the
// format. Of a file that is anything else nothing counts: better no choice than a wrong one.
#include "conv/tuning.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <unordered_map>

#include "conv/measured.h"
#ifdef UNET_FAST_CUDNN
#include "conv/cudnn/engine.h"
#endif

namespace unet_fast::gpu {
namespace {

constexpr char kFormat[] = "unet_fast tuning 1";
constexpr Engine kEngines[] = {Engine::kAuto, Engine::kWmma, Engine::kSm90, Engine::kCudnn};

using Table = std::unordered_map<std::string, Choice>;

bool ParseEngine(const std::string& name, Engine* engine) {
  for (const Engine e : kEngines) {
    if (name == EngineName(e)) return *engine = e, true;
  }
  return false;
}

// Whole numbers within bounds alone: the file may have been written by anything.
bool ParseInt(const std::string& text, int least, int most, int* value) {
  char* end;
  const long v = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != 0 || v < least || v > most) return false;
  *value = static_cast<int>(v);
  return true;
}

bool Parse(const std::string& text, Table* table) {
  std::istringstream lines(text);
  std::string line;
  if (!std::getline(lines, line) || line != kFormat) return false;
  while (std::getline(lines, line)) {
    std::istringstream fields(line);
    std::string key, engine, config, splits;
    Choice choice;
    if (!std::getline(fields, key, '\t') || !std::getline(fields, engine, '\t') ||
        !std::getline(fields, config, '\t') || !std::getline(fields, splits, '\t') || key.empty() ||
        !ParseEngine(engine, &choice.engine) || !ParseInt(config, -1, 1 << 10, &choice.config) ||
        !ParseInt(splits, 0, 1 << 12, &choice.splits)) {
      return false;
    }
    (*table)[key] = choice;
  }
  return true;
}

std::string FirstLine(const char* path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  return line;
}

std::string Folder() {
  const char* set = std::getenv("UNET_FAST_CACHE");
  if (set != nullptr && *set != 0) return set;
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && *cache != 0) return std::string(cache) + "/unet_fast";
  const char* home = std::getenv("HOME");
  return std::string(home != nullptr ? home : ".") + "/.cache/unet_fast";
}

Table Read() {
  Table table;
  const std::string path = TuningPath();
  std::ifstream file(path);
  if (path.empty() || !file) return table;
  std::stringstream text;
  text << file.rdbuf();
  if (!Parse(text.str(), &table)) {
    std::fprintf(stderr, "unet_fast: %s is no tuning file and is ignored; delete it\n", path.c_str());
    table.clear();
  }
  return table;
}

struct Tables {
  std::mutex mutex;
  std::map<int, Table> of_device;
};
Tables& AllTables() {
  static Tables* tables = new Tables;  // outlives whoever asks while the process ends
  return *tables;
}

int CurrentDevice() {
  int device;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

Engine EngineOfEnvironment() {
  static const Engine engine = [] {
    const char* name = std::getenv("UNET_FAST_ENGINE");  // unet_fast/_library.py says what is wrong with it
    Engine e = Engine::kAuto;
    if (name != nullptr) ParseEngine(name, &e);
    return e;
  }();
  return engine;
}

const char* Name(DType dtype) { return dtype == DType::kFloat16 ? "float16" : "bfloat16"; }

// "8x570x570x64+64/2", images, pixels, channels of the sources, stride.
template <typename Args>
std::string SourceKey(const Args& g) {
  std::string text = std::to_string(g.batch) + "x" + std::to_string(g.source_h) + "x" + std::to_string(g.source_w) +
                     "x" + std::to_string(g.source[0].channels);
  if (g.sources == 2) text += "+" + std::to_string(g.source[1].channels);
  return text + "/" + std::to_string(g.stride);
}
template <typename Args>
std::string ResultKey(const Args& g, int n) {
  return std::to_string(g.out_h) + "x" + std::to_string(g.out_w) + "x" + std::to_string(n);
}

}  // namespace

const char* EngineName(Engine engine) {
  switch (engine) {
    case Engine::kWmma:
      return "wmma";
    case Engine::kSm90:
      return "sm90";
    case Engine::kCudnn:
      return "cudnn";
    default:
      return "auto";
  }
}

std::string ProductKey(DType dtype, const GemmArgs& g) {
  std::string text =
      std::string(Name(dtype)) + " product " + SourceKey(g) + " > " + ResultKey(g, g.whole_n > 0 ? g.whole_n : g.n);
  int taps = 0;
  for (int l = 0; l < g.lists; ++l) taps += g.taps[l].count;
  text += ", " + std::to_string(taps) + " taps from " + std::to_string(g.taps[0].tap[0].row);
  if (g.lists > 1) text += " in " + std::to_string(g.lists) + " lists";
  if (g.transposed) text += ", transposed";
  if (g.bias != nullptr) text += g.relu ? ", bias, relu" : ", bias";
  if (g.pooled != nullptr) text += ", pooled";
  return text;
}

std::string ProductKey(DType dtype, const WgradArgs& g) {
  return std::string(Name(dtype)) + " weights " + SourceKey(g) + " > " + ResultKey(g, g.n) + ", " +
         std::to_string(g.taps.count) + " taps from " + std::to_string(g.taps.tap[0].row);
}

std::string ProductKey(const Product& p) {
  return p.is_wgrad ? ProductKey(p.dtype, p.wgrad) : ProductKey(p.dtype, p.gemm);
}

Choice ChosenFor(const std::string& key) {
  if (EngineOfEnvironment() != Engine::kAuto) return {EngineOfEnvironment(), -1, 0};
  Tables& tables = AllTables();
  const std::lock_guard<std::mutex> lock(tables.mutex);
  const auto [table, is_new] = tables.of_device.try_emplace(CurrentDevice());
  if (is_new) table->second = Read();
  const auto found = table->second.find(key);
  return found == table->second.end() ? ShippedFor(key, ComputeCapability()) : found->second;
}

Choice ShippedFor(const std::string& key, int capability) {
  static const Table* table = [] {
    Table* t = new Table;
    Parse(kMeasured, t);
    return t;
  }();
  if (capability != 90) return Choice();
  const auto found = table->find(key.substr(key.find(' ') + 1));
  return found == table->end() ? Choice() : found->second;
}

std::string TuningPath() {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, CurrentDevice()) != cudaSuccess) return "";
  std::string driver = FirstLine("/sys/module/nvidia/version");
  int version = 0;
  if (driver.empty() && cudaDriverGetVersion(&version) == cudaSuccess) driver = "cuda" + std::to_string(version);
  int64_t cudnn_version = 0;
#ifdef UNET_FAST_CUDNN
  cudnn_version = cudnn::Version();
#endif
  std::string name = std::string(properties.name) + "-" + driver + "-cudnn" + std::to_string(cudnn_version) + "-" +
                     std::string(UNET_FAST_FINGERPRINT).substr(0, 16) + ".tsv";
  for (char& c : name) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '-') c = '_';
  }
  return Folder() + "/" + name;
}

}  // namespace unet_fast::gpu

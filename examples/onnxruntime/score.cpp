// Scores one PNG by ONNX Runtime, without Python: score MODEL.onnx IMAGE.png
//
// Prints score, log_score and absolute_score. A fault is one line on standard error, and exit code 1.
// docs/deployment.md has the line that compiles this file.

#include <onnxruntime_cxx_api.h>
#include <png.h>

#include <array>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// The pixels, (3, height, width) in [0, 1]. Gray is repeated and transparency dropped, as fastmsflow does.
std::vector<float> read_png(const std::string& path, int64_t height, int64_t width) {
    png_image png{};
    png.version = PNG_IMAGE_VERSION;
    std::unique_ptr<png_image, decltype(&png_image_free)> freed(&png, png_image_free);
    const auto refuse = [&](const std::string& reason) { throw std::runtime_error(path + ": " + reason); };
    if (!png_image_begin_read_from_file(&png, path.c_str()))
        refuse("no readable PNG: " + std::string(png.message));
    if (png.height != height || png.width != width)
        refuse("the image is " + std::to_string(png.height) + "x" + std::to_string(png.width) + "; this model takes " +
               std::to_string(height) + "x" + std::to_string(width) + " (height x width): resize it");
    if (png.format & PNG_FORMAT_FLAG_LINEAR) refuse("the image has 16 bits a channel: convert it to 8");
    png.format = PNG_FORMAT_RGBA;
    std::vector<png_byte> bytes(PNG_IMAGE_SIZE(png));
    if (!png_image_finish_read(&png, nullptr, bytes.data(), 0, nullptr))
        refuse("no readable PNG: " + std::string(png.message));
    const size_t pixels = size_t(height) * size_t(width);
    std::vector<float> images(3 * pixels);
    for (size_t channel = 0; channel < 3; ++channel)
        for (size_t pixel = 0; pixel < pixels; ++pixel)
            images[channel * pixels + pixel] = bytes[4 * pixel + channel] / 255.0f;
    return images;
}

int main(int count, char** arguments) try {
    if (count != 3) throw std::runtime_error("usage: score MODEL.onnx IMAGE.png");
    Ort::Env environment(ORT_LOGGING_LEVEL_FATAL);
    Ort::Session session(environment, arguments[1], Ort::SessionOptions{});
    const auto size = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    if (size.size() != 4) throw std::runtime_error(std::string(arguments[1]) + ": no model that fastmsflow exported");
    const std::array<int64_t, 4> shape{1, 3, size[2], size[3]};
    auto images = read_png(arguments[2], shape[2], shape[3]);
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const auto input = Ort::Value::CreateTensor<float>(memory, images.data(), images.size(), shape.data(), 4);
    const char* given[] = {"images"};
    const std::array<const char*, 3> asked{"score", "log_score", "absolute_score"};
    const auto found = session.Run(Ort::RunOptions{}, given, &input, 1, asked.data(), asked.size());
    for (size_t i = 0; i < asked.size(); ++i) std::printf("%s %.9g\n", asked[i], *found[i].GetTensorData<float>());
} catch (const std::exception& fault) {
    std::fprintf(stderr, "score: %s\n", fault.what());
    return 1;
}

// Fits y = 2 x - 1 by least squares, with ADADELTA on an optserve server. No code of optserve's: the contract is
// loaded at run time. Run `npm install` here, start a server with `optserve serve`, then:
//
//   node example.mjs [HOST:PORT]

import { randomUUID } from "node:crypto";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const protos = fileURLToPath(new URL("../../proto", import.meta.url));
const definition = loader.loadSync("optserve/v1/service.proto", { includeDirs: [protos], longs: Number });
const { OptimizerService } = grpc.loadPackageDefinition(definition).optserve.v1;

const target = process.argv[2] ?? "127.0.0.1:50051";
// A proxy that the environment names, for the network outside, is not asked for this machine's own addresses.
const local = /^(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$/.test(target);
const options = local ? { "grpc.enable_http_proxy": 0 } : {};
const server = new OptimizerService(target, grpc.credentials.createInsecure(), options);
const call = (method, request) => promisify(server[method].bind(server))(request, { deadline: Date.now() + 10_000 });

// Tensors travel as raw little-endian bytes.
const toBytes = (values) => Buffer.from(Float32Array.from(values).buffer);
const toValues = (bytes) => new Float32Array(Uint8Array.from(bytes).buffer);

// The data: y = 2 x - 1 on [-1, 1].
const xs = Array.from({ length: 41 }, (_, i) => i / 20 - 1);
const ys = xs.map((x) => 2 * x - 1);

// The model: params = [slope, intercept], and the gradient of the mean squared error.
const params = [0, 0];
function gradient() {
  const g = [0, 0];
  xs.forEach((x, i) => {
    const error = params[0] * x + params[1] - ys[i];
    g[0] += (2 * error * x) / xs.length;
    g[1] += (2 * error) / xs.length;
  });
  return g;
}

const { optimizer } = await call("CreateOptimizer", {
  optimizerId: `node-${randomUUID()}`,
  optimizer: {
    algorithm: { adadelta: { rho: 0.95, eps: 1e-4 } },
    parameters: [{ name: "line", shape: [2] }],
  },
});

for (let step = 0; step < 300; step++) {
  const { result, updates } = await call("ApplyGradients", {
    name: optimizer.name,
    requestId: randomUUID(), // the same id again would get the same answer and change nothing
    expectedStep: step,
    gradients: [{ name: "line", data: toBytes(gradient()) }],
  });
  toValues(updates[0].data).forEach((delta, i) => (params[i] += delta));
  if (result.step % 50 === 0) console.log(`step ${result.step}: y = ${params[0].toFixed(4)} x + ${params[1].toFixed(4)}`);
}

await call("DeleteOptimizer", { name: optimizer.name });
server.close();

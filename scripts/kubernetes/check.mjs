// Checks resources of Prometheus Operator, a JSON array on standard input, against its CRDs: values by their schemas, and names of
// fields by their types, since the schemas allow any further field.
// Usage: check.mjs FOLDER, in which npm has installed what package.json names.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const folder = process.argv[2];
const require = createRequire(`${folder}/`);
const ts = require("typescript");
const resources = JSON.parse(readFileSync(0, "utf8"));
const problems = resources.length ? [] : ["there are no resources to check"];

// The CRD asks for neither, but the package takes this part of a Prometheus for a resource.
for (const { spec } of resources) {
    const claim = spec.storage?.volumeClaimTemplate;
    if (claim) Object.assign(claim, { apiVersion: "monitoring.coreos.com/v1", kind: "EmbeddedPersistentVolumeClaim" });
}

const moduleOf = ({ apiVersion, kind }) => `@kubernetes-models/prometheus-operator/${apiVersion}/${kind}`;
const path = (name) => join(folder, "node_modules", `${name}.js`);
const nameOf = ({ kind, metadata }) => `${kind} ${metadata.name}`;

for (const resource of resources) {
    const model = await import(pathToFileURL(path(moduleOf(resource))));
    try {
        new model[resource.kind](resource).validate();
    } catch (error) {
        problems.push(`${nameOf(resource)}: ${error.message}`);
    }
}

// One resource a line. Their classes add `apiVersion` and `kind` themselves.
const program = resources.map((resource, index) => {
    const { apiVersion, kind, ...rest } = resource;
    return `import { ${kind} as K${index} } from "${moduleOf(resource)}"; new K${index}(${JSON.stringify(rest)});`;
});
const main = join(folder, "resources.mts");
const options = { module: ts.ModuleKind.NodeNext, noEmit: true, strict: true, types: [] };
const host = ts.createCompilerHost(options);
const { getSourceFile, fileExists } = host;
host.fileExists = (name) => name === main || fileExists(name);
host.getSourceFile = (name, ...rest) =>
    name === main ? ts.createSourceFile(name, program.join("\n"), ...rest) : getSourceFile(name, ...rest);
for (const { file, start, messageText } of ts.getPreEmitDiagnostics(ts.createProgram([main], options, host))) {
    const line = file?.getLineAndCharacterOfPosition(start).line;
    const name = line === undefined ? "types" : nameOf(resources[line]);
    problems.push(`${name}: ${ts.flattenDiagnosticMessageText(messageText, "\n")}`);
}

for (const problem of problems) console.error(problem);
if (problems.length) process.exit(1);
console.log(`${resources.length} resources of Prometheus Operator are valid`);

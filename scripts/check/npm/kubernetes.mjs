// Checks the manifests of examples/kubernetes: `node kubernetes.mjs RULES FOLDER…`, from the top level of the repository, with
// `kubectl` on the PATH. Values are checked by the schemas of Kubernetes and of Prometheus Operator, names of fields by their
// types, since some schemas allow any further field.
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { isDeepStrictEqual } from 'node:util';
import yaml from 'js-yaml';
import ts from 'typescript';

const [rules, ...folders] = process.argv.slice(2);
const problems = [];
const read = (file) => readFileSync(file, 'utf8');
const nameOf = ({ kind, metadata }) => `${kind} ${metadata.name}`;
const operators = (resource) => resource.apiVersion.startsWith('monitoring.coreos.com/');

// What the profile `restricted` of the Pod Security Standards forbids, and what these manifests promise beyond it.
function* violations(pod, variables) {
	const both = pod.securityContext ?? {};
	for (const field of ['hostNetwork', 'hostPID', 'hostIPC']) if (pod[field]) yield `${field} is set`;
	const allowed = ['name', 'configMap', 'emptyDir', 'persistentVolumeClaim', 'projected', 'secret'];
	for (const volume of pod.volumes ?? [])
		if (Object.keys(volume).some((key) => !allowed.includes(key))) yield `the volume ${volume.name} is of another type`;
	// Prometheus Operator's own containers have only what the pod says.
	if (both.runAsNonRoot !== true || both.seccompProfile?.type !== 'RuntimeDefault')
		yield 'the pod may run as root, or has no seccomp profile';
	for (const container of [...(pod.initContainers ?? []), ...(pod.containers ?? [])]) {
		const own = { ...both, ...container.securityContext };
		const promises = {
			'may run as root': own.runAsNonRoot === true && own.runAsUser > 0,
			'may gain privileges': own.allowPrivilegeEscalation === false,
			'has capabilities': isDeepStrictEqual(own.capabilities, { drop: ['ALL'] }),
			'has no seccomp profile': own.seccompProfile?.type === 'RuntimeDefault',
			'can write to its root file system': own.readOnlyRootFilesystem === true,
			'has no request of CPU or memory': container.resources?.requests?.cpu && container.resources.requests.memory,
			'has no limit of memory': container.resources?.limits?.memory,
			'has no liveness probe': container.livenessProbe,
		};
		for (const [problem, kept] of Object.entries(promises)) if (!kept) yield `${container.name} ${problem}`;
		for (const { name } of container.env ?? [])
			if (!variables.has(name)) yield `${container.name}: the program has no variable ${name}`;
	}
}

// The names of a ScrapeConfig as those of Prometheus' configuration.
function snake(value) {
	if (Array.isArray(value)) return value.map(snake);
	if (value === null || typeof value !== 'object') return value;
	const names = { fileSDConfigs: 'file_sd_configs', metricRelabelings: 'metric_relabel_configs', relabelings: 'relabel_configs' };
	const name = (key) => names[key] ?? key.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
	return Object.fromEntries(Object.entries(value).map(([key, item]) => [name(key), snake(item)]));
}

// A job without what has to differ: where its list comes from, and what only sharding or only the stack needs.
function comparable({ job_name, file_sd_configs, http_s_d_configs, ...job } = {}) {
	if (/^http:\/\/(tunnel|127\.0\.0\.1|baletheus):9798$/.test(job.proxy_url)) job.proxy_url = 'the tunnel';
	// The operator names the job itself. The rule that takes the names of the stack's jobs from a device has to be there.
	job.relabel_configs = (job.relabel_configs ?? []).filter(
		({ target_label, replacement }) => target_label !== '__tmp_hash' && !(target_label === 'job' && replacement === 'balena'),
	);
	// To store only what is read spares the memory of a device; a server stores everything.
	job.metric_relabel_configs = (job.metric_relabel_configs ?? []).filter(
		({ target_label, source_labels }) => target_label !== '__tmp_unused' && !source_labels.includes('__tmp_unused'),
	);
	return job;
}

const variables = new Set(read('src/config/options.rs').match(/(?<=")[A-Z][A-Z_]+(?=")/g));
const stack = Object.fromEntries(yaml.load(read('prometheus.yml')).scrape_configs.map((job) => [job.job_name, job]));
const resources = yaml.loadAll(read(rules));
for (const folder of folders) {
	const found = {};
	for (const resource of yaml.loadAll(execFileSync('kubectl', ['kustomize', folder], { encoding: 'utf8' }))) {
		resources.push(resource);
		const pod = { Deployment: resource.spec?.template?.spec, Prometheus: resource.spec }[resource.kind];
		for (const problem of pod ? violations(pod, variables) : []) problems.push(`${folder}: ${nameOf(resource)}: ${problem}`);
		if (resource.kind === 'ScrapeConfig') {
			const { jobName, ...spec } = resource.spec;
			// The only guard of prometheus.yml for which a ScrapeConfig has no field; docs/kubernetes-debian.md says what follows.
			found[resource.metadata.name] = { follow_redirects: false, ...snake(spec) };
		}
		const config = resource.kind === 'ConfigMap' && resource.data['prometheus.yml'];
		for (const job of config ? yaml.load(config).scrape_configs : []) found[job.job_name] = job;
	}
	for (const job of ['balena', 'balena-direct'])
		if (!isDeepStrictEqual(comparable(found[job]), comparable(stack[job])))
			problems.push(`${folder}: the job ${job} differs from that of prometheus.yml: ${JSON.stringify(found[job])}`);
	for (const job of ['baletheus', 'baletheus-tunnel'])
		if (found[job]?.honor_labels !== stack[job].honor_labels)
			problems.push(`${folder}: honor_labels of the job ${job} differs from that of prometheus.yml`);
}

const moduleOf = (resource) =>
	`${operators(resource) ? '@kubernetes-models/prometheus-operator' : 'kubernetes-models'}/${resource.apiVersion}/${resource.kind}`;
for (const resource of resources) {
	// The CRD asks for neither, but the package takes this part of a Prometheus for a resource.
	const claim = resource.kind === 'Prometheus' && resource.spec.storage?.volumeClaimTemplate;
	if (claim) Object.assign(claim, { apiVersion: 'monitoring.coreos.com/v1', kind: 'EmbeddedPersistentVolumeClaim' });
	try {
		const model = await import(moduleOf(resource));
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
const main = new URL('resources.mts', import.meta.url).pathname;
const options = { module: ts.ModuleKind.NodeNext, noEmit: true, skipLibCheck: true, strict: true, types: [] };
const host = ts.createCompilerHost(options);
const { getSourceFile, fileExists } = host;
host.fileExists = (name) => name === main || fileExists(name);
host.getSourceFile = (name, ...rest) =>
	name === main ? ts.createSourceFile(name, program.join('\n'), ...rest) : getSourceFile(name, ...rest);
for (const { file, start, messageText } of ts.getPreEmitDiagnostics(ts.createProgram([main], options, host))) {
	const line = file?.getLineAndCharacterOfPosition(start).line;
	const name = line === undefined ? 'types' : nameOf(resources[line]);
	problems.push(`${name}: ${ts.flattenDiagnosticMessageText(messageText, '\n')}`);
}

for (const problem of problems) console.error(problem);
if (problems.length) process.exit(1);
console.log(`${resources.length} resources are valid`);

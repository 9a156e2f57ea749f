// Runs balena's two parsers on compose files: `node parse.mjs FOLDER-OF-NODE_MODULES FILE…`. compose-parser is a program
// around compose-go and a check of what that makes of a file; the program is only on GitHub, so Docker Compose, which is
// compose-go as well, stands in for it (scripts/test-stack).
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { isDeepStrictEqual } from 'node:util';

const [folder, ...files] = process.argv.slice(2);
const require = createRequire(`${folder}/`);
const yaml = require('js-yaml');
const { normalize } = require('@balena/compose/dist/parse');
const { parse } = require('@balena/compose-parser');

console.warn = () => {}; // `version` is obsolete to one of them, and required by the other

const FIELDS = [
	...['cap_add', 'cap_drop', 'command', 'environment', 'labels', 'network_mode'],
	...['ports', 'read_only', 'restart', 'tmpfs', 'user', 'volumes'],
];

// What either makes of a file, reduced to what both tell in the same way.
const services = ({ services }) =>
	Object.fromEntries(
		Object.entries(services).map(([name, service]) => [
			name,
			Object.fromEntries(
				FIELDS.map((field) => [field, service[field] ?? null]),
			),
		]),
	);

for (const file of files) {
	const older = services(normalize(yaml.load(readFileSync(file, 'utf8'))));
	const newer = services(await parse(file));
	if (!isDeepStrictEqual(older, newer)) {
		throw new Error(`${file} is not the same to both:\n${JSON.stringify(older)}\n${JSON.stringify(newer)}`);
	}
	console.log(`${file}: ${Object.keys(newer).join(', ')}`);
}

// Runs balena's two parsers on compose files: `node compose.mjs FILE…`. compose-parser consists of a program
// around compose-go and a check of that program's output. The program is only on GitHub, so scripts/check/stack replaces it with
// Docker Compose, which uses compose-go as well.
import { readFileSync } from 'node:fs';
import { isDeepStrictEqual } from 'node:util';
import { normalize } from '@balena/compose/dist/parse/index.js';
import { parse } from '@balena/compose-parser';
import yaml from 'js-yaml';

console.warn = () => {}; // one parser warns that `version` is obsolete, the other requires it

const FIELDS = [
	...['cap_add', 'cap_drop', 'command', 'environment', 'labels', 'network_mode'],
	...['ports', 'read_only', 'restart', 'tmpfs', 'user', 'volumes'],
];

// The result of a parser, reduced to the fields that both express in the same way.
const services = ({ services }) =>
	Object.fromEntries(
		Object.entries(services).map(([name, service]) => [
			name,
			Object.fromEntries(
				FIELDS.map((field) => [field, service[field] ?? null]),
			),
		]),
	);

for (const file of process.argv.slice(2)) {
	const older = services(normalize(yaml.load(readFileSync(file, 'utf8'))));
	const newer = services(await parse(file));
	if (!isDeepStrictEqual(older, newer)) {
		throw new Error(`${file} is read differently by the two parsers:\n${JSON.stringify(older)}\n${JSON.stringify(newer)}`);
	}
	console.log(`${file}: ${Object.keys(newer).join(', ')}`);
}

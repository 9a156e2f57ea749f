//! The documents: each link leads somewhere, what a command names is there, and the samples are what the program prints.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::binary;
use crate::support::cloud::{Cloud, KEY, Reply};
use crate::support::fleet::{demo_fleet, find, set_tag};
use crate::support::sidecar::{Sidecar, finish};
use crate::support::vpn::Vpn;
use regex::Regex;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const README: &str = include_str!("../../README.md");
const README_LINES: usize = 150;
/// Where the samples are.
const TROUBLESHOOTING: &str = include_str!("../../docs/troubleshooting.md");

/// README, CONTRIBUTING and the like, all of `docs/`, and each README below `examples/`.
fn documents() -> BTreeMap<PathBuf, String> {
    let root = Path::new(ROOT);
    let mut folders = vec![root.to_owned(), root.join("docs"), root.join("docs/dev"), root.join("examples")];
    let mut documents = BTreeMap::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.extension().is_some_and(|extension| extension == "md") {
                let text = fs::read_to_string(&entry).unwrap();
                documents.insert(entry, text);
            } else if entry.is_dir() && folder.starts_with(root.join("examples")) {
                folders.push(entry);
            }
        }
    }
    documents
}

/// Prose without code, and code without prose.
fn split(text: &str) -> (String, String) {
    let (mut prose, mut code, mut is_code) = (String::new(), String::new(), false);
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
        } else {
            let part = if is_code { &mut code } else { &mut prose };
            part.push_str(line);
            part.push('\n');
        }
    }
    assert!(!is_code, "a code block is not closed");
    // Commands stand in the text as well.
    let inline = Regex::new("`[^`\n]+`").unwrap();
    code.extend(inline.find_iter(&prose).map(|found| format!("{}\n", found.as_str().trim_matches('`'))));
    (inline.replace_all(&prose, "").into_owned(), code)
}

/// The anchors of a document, made of its headings as GitHub makes them.
fn anchors(text: &str) -> HashSet<String> {
    let (mut anchors, mut is_code) = (HashSet::new(), false);
    for line in text.lines() {
        is_code ^= line.trim_start().starts_with("```");
        let Some(heading) = line.strip_prefix('#').filter(|_| !is_code) else { continue };
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let again = (1..).map(|number| format!("{anchor}-{number}"));
        let free = [anchor.clone()].into_iter().chain(again).find(|anchor| !anchors.contains(anchor));
        anchors.extend(free);
    }
    anchors
}

#[test]
fn each_link_leads_somewhere() {
    let documents = documents();
    let link = Regex::new(r"\]\(([^)\s]+)\)").unwrap();
    let mut wrong = Vec::new();
    let mut checked = 0;
    for (path, text) in &documents {
        for target in link.captures_iter(&split(text).0).map(|found| found[1].to_owned()) {
            if target.contains("://") {
                continue;
            }
            checked += 1;
            let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let file = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            let file = file.canonicalize().unwrap_or(file);
            let has_anchor = || documents.get(&file).is_some_and(|text| anchors(text).contains(anchor));
            if !file.exists() || !(anchor.is_empty() || has_anchor()) {
                wrong.push(format!("{}: {target}", path.strip_prefix(ROOT).unwrap().display()));
            }
        }
    }
    assert!(checked > 50, "only {checked} links are read");
    assert!(wrong.is_empty(), "these lead nowhere:\n{}", wrong.join("\n"));
}

#[test]
fn each_script_and_cargo_target_in_a_command_is_there() {
    let script = Regex::new(r"(?:^|[\s(])(?:\./)?((?:scripts|\.ci)/[\w./-]+)").unwrap();
    let target = Regex::new(r"--(example|test|bench)[ =]([\w-]+)").unwrap();
    let mut wrong = Vec::new();
    let mut checked = 0;
    for (path, text) in documents() {
        let code = split(&text).1;
        let scripts = script.captures_iter(&code).map(|found| found[1].to_owned());
        let targets = target.captures_iter(&code).map(|found| match &found[1] {
            "bench" => format!("benches/{}", &found[2]),
            kind => format!("{kind}s/{}", &found[2]),
        });
        for name in scripts.chain(targets) {
            checked += 1;
            let path_of = |end: &str| Path::new(ROOT).join(format!("{name}{end}"));
            if !["", ".rs", "/main.rs"].iter().any(|end| path_of(end).exists()) {
                wrong.push(format!("{}: {name}", path.strip_prefix(ROOT).unwrap().display()));
            }
        }
    }
    assert!(checked > 10, "only {checked} names are read");
    assert!(wrong.is_empty(), "these are not there:\n{}", wrong.join("\n"));
}

/// The pages for developers name files, which move.
#[test]
fn each_file_in_the_pages_for_developers_is_there() {
    let name = Regex::new(r"^[\w./-]+/[\w-]+\.(?:rs|yml|md)$|^[\w./-]+/$").unwrap();
    let (mut wrong, mut checked) = (Vec::new(), 0);
    for (path, text) in documents().into_iter().filter(|(path, _)| path.parent().unwrap().ends_with("docs/dev")) {
        for line in split(&text).1.lines().filter(|line| name.is_match(line)) {
            checked += 1;
            if !["", "src"].iter().any(|folder| Path::new(ROOT).join(folder).join(line).exists()) {
                wrong.push(format!("{}: {line}", path.strip_prefix(ROOT).unwrap().display()));
            }
        }
    }
    assert!(checked > 50, "only {checked} names are read");
    assert!(wrong.is_empty(), "these are not there:\n{}", wrong.join("\n"));
}

/// A merge once lost the function of a part, and nothing noticed until somebody ran it.
#[test]
fn each_part_of_the_long_tests_is_there() {
    let script = include_str!("../../scripts/full");
    let (_, rest) = script.split_once("\nparts=(").expect("the list of parts");
    let parts: Vec<_> = rest.split_once(')').unwrap().0.split(' ').collect();
    assert!(parts.len() > 5, "only {parts:?} are read");
    let mut wrong = Vec::new();
    for part in &parts {
        let explained = script.lines().any(|line| line.starts_with(&format!("#   {part} ")));
        if !explained || !script.contains(&format!("\n{part}() {{")) {
            wrong.push(format!("scripts/full: {part} has no function, or no line at the top"));
        }
    }
    let command = Regex::new(r"scripts/full((?: [a-z]+)+)").unwrap();
    for (path, text) in documents() {
        let code = split(&text).1;
        let named = command.captures_iter(&code).flat_map(|found| found.get(1).unwrap().as_str().split_whitespace());
        let unknown = named.filter(|name| !parts.contains(name));
        wrong.extend(unknown.map(|name| format!("{}: scripts/full {name}", path.display())));
    }
    assert!(wrong.is_empty(), "these parts are not there:\n{}", wrong.join("\n"));
}

#[test]
fn the_readme_is_short() {
    let lines = README.lines().count();
    assert!(
        lines <= README_LINES,
        "README.md has {lines} lines, and {README_LINES} at most: move what is less needed to docs/"
    );
}

/// The fleet of the samples: a device that answers, one that is offline, one without its exporter, one that is
/// switched off.
fn samples() -> (Cloud, Cloud, Vpn) {
    let mut devices = demo_fleet();
    set_tag(find(&mut devices, "freezer-01"), "prometheus.io/scrape", "false");
    let names = ["fridge-01", "fridge-03", "fridge-04", "freezer-01"];
    devices.retain(|device| names.contains(&device["device_name"].as_str().unwrap_or_default()));
    let backend = Cloud::start(Vec::new());
    backend.intercept(|_, _| {
        let body = "node_load1 0.5\n".repeat(507);
        Some(Reply::status(200, &[("Content-Type", "text/plain; version=0.0.4")], body.as_bytes()))
    });
    let vpn = Vpn::start(KEY, None);
    for device in &mut devices {
        let name = device["device_name"].as_str().unwrap_or_default();
        vpn.device(device["uuid"].as_str().unwrap(), |device| {
            device.offline = name == "fridge-03";
            if name != "fridge-04" {
                device.ports.insert(9100, backend.addr());
            }
        });
    }
    (Cloud::start(devices), backend, vpn)
}

/// A sample behind a comment of docs/troubleshooting.md, and what the program printed, alike but for `changing`.
fn compare(comment: &str, printed: &str, changing: &str) {
    let (_, rest) = TROUBLESHOOTING.split_once(comment).unwrap_or_else(|| panic!("no {comment}"));
    let sample = rest.split_once("```text\n").unwrap().1.split_once("```").unwrap().0;
    let changing = Regex::new(changing).unwrap();
    let [known, found] = [sample, printed].map(|text| changing.replace_all(text, "…").into_owned());
    assert_eq!(known, found, "\ndocs/troubleshooting.md, behind {comment}, has to be:\n\n{printed}");
}

/// Messages are quoted in the tables; `…` and a number stand for what differs.
#[test]
fn each_message_in_the_tables_is_one_of_the_program() {
    let mut source = String::new();
    let mut folders = vec![Path::new(ROOT).join("src")];
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() { folders.push(path) } else { source += &fs::read_to_string(path).unwrap() }
        }
    }
    let source = Regex::new(r"\\\n\s*").unwrap().replace_all(&source, "").replace("\\\"", "\"");
    let quoted = Regex::new("`([^`]+)`").unwrap();
    // Statuses are named by the HTTP library, and Prometheus has its own words.
    let foreign =
        Regex::new(r"^(?:HTTP )?\d{3}|^x509|^non-compliant|^Request Header Fields|^TLS: invalid peer").unwrap();
    let (mut column, mut checked, mut wrong) = (None, 0, Vec::new());
    for line in TROUBLESHOOTING.lines() {
        let cells: Vec<_> = line.trim_matches(['|', ' ']).split(" | ").collect();
        if !line.starts_with('|') {
            column = None;
        } else if let Some(at) = cells.iter().position(|cell| *cell == "message") {
            column = Some(at);
        } else if let Some(at) = column {
            let messages = quoted.captures_iter(cells[at]).map(|found| found[1].to_owned());
            for message in messages.filter(|message| !foreign.is_match(message)) {
                checked += 1;
                let parts = message.split('…').map(str::trim).filter(|part| !part.is_empty());
                wrong.extend(parts.filter(|part| !source.contains(part)).map(str::to_owned));
            }
        }
    }
    assert!(checked > 25, "only {checked} messages are read");
    assert!(wrong.is_empty(), "no message of the program has:\n{}", wrong.join("\n"));
}

#[test]
fn the_sample_of_check_is_what_it_prints() {
    let (cloud, _backend, vpn) = samples();
    let sidecar = Sidecar::of(binary::path(), &cloud).env("TUNNEL_URL", vpn.url());
    let mut command = sidecar.command();
    command.args(["check", "--exporter", "node:9100"]);
    let printed = String::from_utf8(finish(command).stdout).unwrap();
    compare("<!-- sample of check", &printed, r"in \d+\.\d\d s");
}

#[test]
fn the_sample_log_is_what_it_logs() {
    let (cloud, _backend, _vpn) = samples();
    let sidecar = Sidecar::of(binary::path(), &cloud).env("EXPORTERS", "node:9100");
    let log: String = sidecar.oneshot().split_inclusive('\n').filter(|line| line.contains("left out")).collect();
    compare("<!-- sample log", &log, r"\d{4}-\d\d-\d\dT[\d:.]+Z");
}

#[test]
fn the_version_is_the_one_of_cargo_everywhere() {
    let version = env!("CARGO_PKG_VERSION");
    let tag = format!("newTag: '{version}'");
    for (path, text) in [
        ("CHANGELOG.md", format!("## [{version}] - ")),
        ("packaging/debian/changelog", format!("baletheus ({version}-1) ")),
        ("docs/kubernetes-debian.md", format!("baletheus_{version}-1_*.deb")),
        ("docs/kubernetes-debian.md", format!("/baletheus:{version}")),
        ("examples/kubernetes/plain/kustomization.yaml", tag.clone()),
        ("examples/kubernetes/operator/kustomization.yaml", tag.clone()),
        ("examples/kubernetes/operator-sharded/kustomization.yaml", tag),
    ] {
        let found = fs::read_to_string(Path::new(ROOT).join(path)).unwrap();
        assert!(found.contains(&text), "{path} lacks {text:?}");
    }
}

/// Dependabot raises some of these. The others have to follow.
#[test]
fn each_image_has_one_version_everywhere() {
    let dockerfile = fs::read_to_string(Path::new(ROOT).join("Dockerfile")).unwrap();
    let version = |image: &str| {
        let (_, rest) = dockerfile.split_once(&format!("FROM {image}:")).expect(image);
        rest.split(['-', ' ']).next().unwrap().to_owned()
    };
    let prometheus = version("prom/prometheus");
    let rust = format!("rust:{}-", version("rust"));
    let node_exporter = Regex::new(r"prom/node-exporter:\S+").unwrap();
    let compose = fs::read_to_string(Path::new(ROOT).join("docker-compose.yml")).unwrap();
    let node_exporter = node_exporter.find(&compose).unwrap().as_str().to_owned();
    for (path, text) in [
        ("examples/often-offline/Dockerfile", format!("prom/prometheus:{prometheus}")),
        ("examples/kubernetes/plain/kustomization.yaml", format!("newTag: {prometheus}")),
        ("examples/kubernetes/operator/prometheus.yaml", format!("version: {prometheus}")),
        ("examples/kubernetes/operator-sharded/prometheus.yaml", format!("version: {prometheus}")),
        ("docs/stack.md", format!("| Prometheus | {},", &prometheus[1..])),
        ("docs/stack.md", format!("| Alertmanager | {} |", &version("prom/alertmanager")[1..])),
        ("docs/stack.md", format!("| Grafana | {},", version("grafana/grafana"))),
        ("docs/stack.md", format!("| node_exporter | {} |", node_exporter.rsplit('v').next().unwrap())),
        (".github/workflows/ci.yml", rust.clone()),
        (".github/workflows/release.yml", rust.clone()),
        ("docs/dev/arm.md", rust),
        ("examples/often-offline/docker-compose.yml", node_exporter.clone()),
        ("examples/thingy/docker-compose.yml", node_exporter.clone()),
        ("examples/thingy/full/docker-compose.yml", node_exporter.clone()),
        ("docs/exporters.md", node_exporter.clone()),
        ("README.md", node_exporter),
    ] {
        let found = fs::read_to_string(Path::new(ROOT).join(path)).unwrap();
        assert!(found.contains(&text), "{path} lacks {text:?}");
    }
}

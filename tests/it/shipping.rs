//! How the program reaches devices, as far as that needs neither root nor a network: what the Dockerfile does by the free memory, and
//! how a release is published.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use regex::Regex;

use crate::support::executable;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const DOCKERFILE: &str = include_str!("../../Dockerfile");
const ARM_PAGE: &str = include_str!("../../docs/dev/arm.md");

/// Runs the Dockerfile's choice on a machine with this memory, and returns the settings of cargo that it leaves, or what it says.
fn choice(available: u64, swap: u64) -> Result<String, String> {
    let folder = tempfile::tempdir().unwrap();
    let meminfo = folder.path().join("meminfo");
    let text = format!(
        "MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {} kB\nSwapFree: {} kB\n",
        available << 10,
        swap << 10
    );
    fs::write(&meminfo, text).unwrap();
    let (_, step) = DOCKERFILE.split_once("\nRUN mkdir .cargo ").expect("the step that looks at the memory");
    let end = Regex::new(r"[^\\]\n").unwrap().find(step).unwrap().start() + 1;
    let command = format!("mkdir .cargo {}", &step[..end]).replace("/proc/meminfo", meminfo.to_str().unwrap());
    let output = Command::new("sh").args(["-c", &command]).current_dir(&folder).output().unwrap();
    if output.status.success() {
        Ok(fs::read_to_string(folder.path().join(".cargo/config.toml")).unwrap_or_default())
    } else {
        Err(String::from_utf8(output.stderr).unwrap())
    }
}

/// The document's two limits, in MiB, are those of the Dockerfile.
#[test]
fn the_dockerfile_builds_by_the_free_memory() {
    let limits: Vec<u64> = Regex::new(r"\| (\d+) MiB or more \|")
        .unwrap()
        .captures_iter(ARM_PAGE)
        .map(|found| found[1].parse().unwrap())
        .collect();
    let [usual, least] = limits[..] else { panic!("{limits:?}") };
    assert_eq!(choice(usual, 0), Ok(String::new()));
    let thin = "[build]\njobs = 1\n[profile.release]\nlto = \"thin\"\n";
    assert_eq!(choice(usual - 1, 0), Ok(thin.into()));
    assert_eq!(choice(least - 100, 100), Ok(thin.into()), "swap counts");
    let why = choice(least - 101, 100).expect_err("too little memory");
    assert!(why.contains(&format!("{least} MiB")) && why.contains(&format!("{} MiB are free", least - 1)), "{why}");
}

/// What `.github/workflows/release.yml` runs on GitHub, with programs that only note how they were called. Its actions run nowhere else.
#[test]
fn publishing_pushes_the_images_and_makes_a_release() {
    let workflow: serde_json::Value =
        yaml_serde::from_str(include_str!("../../.github/workflows/release.yml")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["programs", "target/releases"] {
        fs::create_dir_all(path(name)).unwrap();
    }
    fs::write(path("CHANGELOG.md"), "# Changelog\n\n## [1.2.3] - today\n\nNews.\n\n## [1.2.2] - before\n\nOld.\n")
        .unwrap();
    fs::write(path("target/releases/SHA256SUMS"), "").unwrap();
    for name in ["docker", "gh"] {
        let note = "#!/bin/sh\n{ echo \"${0##*/}\" \"$@\"; [ -t 0 ] || cat; } >>calls\n";
        executable::write(&path("programs").join(name), note);
    }
    let programs = format!("{}:{}", path("programs").display(), std::env::var("PATH").unwrap());
    for step in workflow["jobs"]["publish"]["steps"].as_array().unwrap() {
        let Some(run) = step["run"].as_str() else { continue };
        // As GitHub runs it where no shell is named.
        let status = Command::new("bash")
            .args(["-e", "-c", run])
            .current_dir(&folder)
            .env_clear()
            .envs([
                ("PATH", programs.as_str()),
                ("GITHUB_REF_NAME", "v1.2.3"),
                ("GITHUB_REPOSITORY", "Owner/Baletheus"),
            ])
            .stdin(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{run}");
    }
    let image = "ghcr.io/owner/baletheus:1.2.3";
    let pushed: String = ["amd64", "arm64", "armv7"]
        .map(|architecture| {
            format!(
                "docker load --input target/releases/baletheus-1.2.3-docker-{architecture}.tar.gz\n\
                 docker tag baletheus:1.2.3-{architecture} {image}-{architecture}\n\
                 docker push {image}-{architecture}\n"
            )
        })
        .concat();
    assert_eq!(
        fs::read_to_string(path("calls")).unwrap(),
        format!(
            "{pushed}docker buildx imagetools create --tag {image} {image}-amd64 {image}-arm64 {image}-armv7\n\
             gh release create v1.2.3 --verify-tag --title 1.2.3 --notes-file - target/releases/SHA256SUMS\n\nNews.\n\n"
        )
    );
}

/// Longer ones are wrapped: the first line of the Debian package's description is what `apt list` and the like show.
#[test]
fn the_description_fits_in_a_line() {
    assert!(env!("CARGO_PKG_DESCRIPTION").len() < 80);
}

/// The command of the Dockerfile, on a dashboard in the forms that exports from grafana.com have.
#[test]
fn a_foreign_dashboard_gets_the_data_source_of_the_stack() {
    let dockerfile = fs::read_to_string(Path::new(ROOT).join("Dockerfile")).unwrap();
    let command = dockerfile.lines().find_map(|line| line.strip_prefix("RUN sed ")).expect("the command");
    let folder = tempfile::tempdir().unwrap();
    let exported = r#"{"__inputs":[{"name":"DS_PROMETHEUS","type":"datasource"}],"panels":[
        {"datasource":"${DS_PROMETHEUS}","targets":[{"datasource":{"type":"prometheus","uid":"${DS_MY-PROM_2}"},"expr":"up{job=\"$job\"}"}]}]}"#;
    fs::write(folder.path().join("foreign.json"), exported).unwrap();
    let here = folder.path().to_str().unwrap();
    let command = format!("sed {}", command.replace("/etc/grafana/dashboards", here));
    assert!(Command::new("sh").args(["-c", &command]).status().unwrap().success());
    let found: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(folder.path().join("foreign.json")).unwrap()).unwrap();
    let source = fs::read_to_string(Path::new(ROOT).join("grafana/provisioning/datasources/prometheus.yml")).unwrap();
    assert!(source.contains("uid: prometheus\n"));
    let panel = &found["panels"][0];
    assert_eq!(panel["datasource"], "prometheus");
    assert_eq!(panel["targets"][0]["datasource"]["uid"], "prometheus");
    assert_eq!(panel["targets"][0]["expr"], "up{job=\"$job\"}", "a variable stays");
}

/// A test with another name would be left out, and nobody would notice.
#[test]
fn the_tests_that_scripts_name_exist() {
    let list = Command::new(env::current_exe().unwrap()).arg("--list").output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let name = Regex::new(r"[a-z_]+::[a-z_0-9:]*").unwrap();
    for file in ["scripts/check/arm", "scripts/release/image", ".github/workflows/ci.yml"] {
        let script = fs::read_to_string(Path::new(ROOT).join(file)).unwrap();
        let named: Vec<_> = name.find_iter(&script).map(|found| found.as_str()).collect();
        assert!(!named.is_empty(), "{file} names tests");
        for name in named {
            assert!(list.lines().any(|line| line.starts_with(name)), "{file}: no test is {name}");
        }
    }
}

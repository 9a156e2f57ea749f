//! How the program reaches devices, as far as that needs neither root nor a network: what the Dockerfile does by the free memory, and
//! what `scripts/release/publish` publishes.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

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

/// What `scripts/release/files` makes for version 1.2.3, in a folder where `scripts/release/publish` finds it, and programs that only note how they
/// were called.
struct Shop(tempfile::TempDir);

impl Shop {
    fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["scripts/release", "scripts/lib", "programs", "target/releases/1.2.3"] {
            fs::create_dir_all(path(name)).unwrap();
        }
        for name in ["release/publish", "lib/need"] {
            executable::copy(&Path::new(ROOT).join("scripts").join(name), &path("scripts").join(name));
        }
        fs::write(path("CHANGELOG.md"), "# Changelog\n\n## [1.2.3] - today\n\nNews.\n\n## [1.2.2] - before\n\nOld.\n")
            .unwrap();
        for name in ["skopeo", "docker", "gh"] {
            let program = path("programs").join(name);
            executable::write(&program, "#!/bin/sh\n{ echo \"${0##*/}\" \"$@\"; [ -t 0 ] || cat; } >>calls\n");
        }
        let made = "for a in amd64 arm64 armv7; do echo $a | gzip >baletheus-1.2.3-docker-$a.tar.gz; done; sha256sum -- * >SHA256SUMS";
        let status = Command::new("sh").args(["-c", made]).current_dir(path("target/releases/1.2.3")).status().unwrap();
        assert!(status.success());
        Shop(folder)
    }

    /// Publishes to this repository, with these variables.
    fn publish(&self, repository: &str, variables: &[(&str, &str)]) -> Output {
        let path = format!("{}:{}", self.0.path().join("programs").display(), std::env::var("PATH").unwrap());
        Command::new(self.0.path().join("scripts/release/publish"))
            .args(["1.2.3", repository])
            .env_clear()
            .envs([("PATH", path.as_str()), ("HOME", self.0.path().to_str().unwrap())])
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// How the programs were called, and what they read.
    fn calls(&self) -> String {
        let calls = fs::read_to_string(self.0.path().join("calls")).unwrap_or_default();
        // The name of a temporary folder.
        Regex::new("docker-archive:[^ ]*/").unwrap().replace_all(&calls, "docker-archive:").into_owned()
    }
}

#[test]
fn publishing_pushes_the_images_and_makes_a_release() {
    let shop = Shop::open();
    let variables = [("REGISTRY_USER", "robot"), ("REGISTRY_PASSWORD", "secret"), ("GH_TOKEN", "token")];
    let output = shop.publish("registry.example/owner/baletheus", &variables);
    assert!(output.status.success(), "{output:?}");
    let home = shop.0.path().display();
    let image = "registry.example/owner/baletheus:1.2.3";
    let files = [
        "SHA256SUMS",
        "baletheus-1.2.3-docker-amd64.tar.gz",
        "baletheus-1.2.3-docker-arm64.tar.gz",
        "baletheus-1.2.3-docker-armv7.tar.gz",
    ]
    .map(|name| format!("target/releases/1.2.3/{name}"))
    .join(" ");
    assert_eq!(
        shop.calls(),
        format!(
            "skopeo login --authfile {home}/.docker/config.json --username robot --password-stdin registry.example\nsecret\n\
             skopeo copy --quiet docker-archive:amd64.tar docker://{image}-amd64\n\
             skopeo copy --quiet docker-archive:arm64.tar docker://{image}-arm64\n\
             skopeo copy --quiet docker-archive:armv7.tar docker://{image}-armv7\n\
             docker manifest create --amend {image} {image}-amd64 {image}-arm64 {image}-armv7\n\
             docker manifest annotate --arch arm --variant v7 {image} {image}-armv7\n\
             docker manifest push --purge {image}\n\
             gh release create v1.2.3 --verify-tag --title 1.2.3 --notes-file - {files}\n\nNews.\n"
        )
    );
}

#[test]
fn a_file_with_another_checksum_is_not_published() {
    let shop = Shop::open();
    fs::write(shop.0.path().join("target/releases/1.2.3/baletheus-1.2.3-docker-arm64.tar.gz"), "something else")
        .unwrap();
    let output = shop.publish("registry.example/owner/baletheus", &[]);
    assert_eq!((output.status.code(), shop.calls().as_str()), (Some(1), ""), "{output:?}");
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

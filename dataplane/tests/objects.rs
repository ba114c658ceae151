//! What the running kernel takes: every program of every object, and what it has besides.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

mod support;

use flynn_dataplane::{Dataplane, Hook, features, features::Feature, verify};
use support::{alone, pins};

fn main() {
    support::main(
        &["ip"],
        |_| None,
        &[
            (
                "the_verifier_takes_every_program",
                the_verifier_takes_every_program,
            ),
            ("features_are_what_can_be_used", features_are_what_can_be_used),
        ],
    )
}

fn the_verifier_takes_every_program() {
    alone(|bpffs| {
        let verified = verify(&pins(bpffs)).unwrap();
        let overlay = verified.iter().find(|(name, _)| *name == "overlay").unwrap();
        assert!(overlay.1.contains(&"from_container".to_owned()), "{verified:?}");
        for (object, programs) in verified {
            assert!(!programs.is_empty(), "{object} has no programs");
        }
        // Over the maps that are there by now as well.
        verify(&pins(bpffs)).unwrap();
    });
}

fn features_are_what_can_be_used() {
    alone(|bpffs| {
        let features = features::probe();
        println!("{features:?}");
        let has = |wanted| {
            features
                .iter()
                .any(|&(feature, there)| feature == wanted && there)
        };
        assert_eq!(
            features.iter().map(|(feature, _)| *feature).collect::<Vec<_>>(),
            Feature::ALL
        );
        let dataplane = Dataplane::open(&pins(bpffs)).unwrap();
        assert_eq!(has(Feature::Tcx), dataplane.hook() == Hook::Tcx);
        // Every kernel that the programs are meant for has these.
        for feature in [
            Feature::Xdp,
            Feature::SkLookup,
            Feature::CgroupSockAddr,
            Feature::SockDestroy,
        ] {
            assert!(has(feature), "{}", feature.name());
        }
        // The probes are right about what iproute2 can make here.
        let made = |arguments: &[&str]| {
            let output = std::process::Command::new("ip").args(arguments).output().unwrap();
            output.status.success()
        };
        assert_eq!(
            has(Feature::WireGuard),
            made(&["link", "add", "wg0", "type", "wireguard"])
        );
    });
}

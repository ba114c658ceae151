//! The daemon, its supervisors and containers on a real kernel.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what is wrong by panicking"
)]

mod attached;
mod container;
mod cycles;
mod escape;
mod faults;
mod host;
mod life;
mod logs;
mod network;
#[path = "../sinks/receiver.rs"]
mod receiver;
mod user_namespaces;
mod volumes;

use std::future::Future;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// Tests by their names.
type Tests = Vec<(&'static str, fn())>;

/// A test: its name, and a run of it on a thread of its own, whose namespaces it may change.
macro_rules! tests {
    ($($module:ident: $($name:ident)*;)*) => {
        vec![$($((stringify!($name), (|| run($module::$name())) as fn())),*),*]
    };
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let lacks = host::lacks();
    let tests: Tests = tests![
        container: runs_a_program_in_its_own_world keeps_layers_and_runs_apart limits_memory limits_processes
            drops_capabilities_and_filters_calls runs_as_another_user masks_and_hides mounts_volumes
            gives_the_router_its_pins names_what_cannot_be_started;
        life: signals_and_stops kills_who_does_not_stop restarts_what_is_to_be_kept rotates_logs follows_logs
            refuses_bad_jobs reports_events checks_ports pauses_and_resumes commands_check_health commands_that_fail_are_explained;
        logs: sinks_get_each_line_once;
        attached: pipes_lose_nothing terminals_have_sizes_and_signals attaches_before_and_after programs_run_beside_the_job_s
            programs_end_with_their_client_or_their_job ports_of_jobs_are_reached;
        faults: containers_outlive_the_daemon an_end_without_a_daemon_is_kept
            a_container_dies_with_its_supervisor a_kept_job_survives_its_supervisor a_broken_record_harms_no_other
            wrong_layers_leave_nothing a_full_disk_is_said_and_survived a_new_boot_is_noticed a_kept_job_comes_back_after_a_shutdown
            two_daemons_do_not_share_a_state;
        cycles: cycles_leave_nothing;
        network: containers_have_addresses services_are_registered missing_layers_are_fetched
            other_hosts_are_encrypted_with_or_named;
        escape: our_program_is_read_only_for_containers images_grant_no_capabilities deep_directories_are_removed;
    ];
    let of_volumes: Tests = tests![
        volumes: a_full_image_is_contained a_full_subvolume_is_contained images_outlive_daemons_and_boots
            snapshots_forks_and_rollbacks snapshots_are_sent_and_received volumes_survive_kills;
    ];
    let of_users: Tests = tests![
        user_namespaces: root_is_nobody_on_the_host volumes_are_handed_on some_jobs_have_none ranges_are_one_jobs_alone
            limits_of_users_are_each_jobs_own;
    ];
    let of_users_and_volumes: Tests = tests![user_namespaces: volumes_of_all_kinds_are_handed_on;];
    let users_lack = lacks.clone().or_else(user_namespaces::lacks);
    let volumes_lack = lacks.clone().or_else(volumes::lacks);
    let trial = |lacks: &Option<String>, (name, test): (&'static str, fn())| match lacks {
        None => Trial::test(name, move || {
            test();
            Ok(())
        }),
        Some(why) => Trial::test(name, || Ok(()))
            .with_kind(format!("skipped: {why}"))
            .with_ignored_flag(true),
    };
    let tests = tests.into_iter().map(|test| trial(&lacks, test));
    let of_volumes = of_volumes.into_iter().map(|test| trial(&volumes_lack, test));
    let of_users = of_users.into_iter().map(|test| trial(&users_lack, test));
    let both_lack = users_lack.clone().or_else(|| volumes_lack.clone());
    let of_users_and_volumes = of_users_and_volumes
        .into_iter()
        .map(|test| trial(&both_lack, test));
    let all = tests
        .chain(of_volumes)
        .chain(of_users)
        .chain(of_users_and_volumes);
    libtest_mimic::run(&arguments, all.collect()).exit_code()
}

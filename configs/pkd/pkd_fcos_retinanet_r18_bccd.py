# PKD: the RetinaNet student learns from the FCOS teacher's feature pyramid. Train the teacher first:
#   python tools/mm.py train configs/pkd/fcos_r18_bccd.py
_base_ = ["./retinanet_r18_bccd.py"]

model = dict(
    type="PKDDetector",
    student_type=_base_.model.type,
    distill=dict(
        teacher="configs/pkd/fcos_r18_bccd.py",
        teacher_ckpt="work_dirs/fcos_r18_bccd/epoch_12.pth",
        loss=dict(type="PKDLoss", loss_weight=10.0),
    ),
)
